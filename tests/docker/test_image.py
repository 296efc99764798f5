from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import yaml

from service.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"

spec = importlib.util.spec_from_file_location("rehearse", DOCKER / "rehearse.py")
assert spec is not None
assert spec.loader is not None
rehearse = sys.modules["rehearse"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rehearse)


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    command = [Path(sysconfig.get_path("scripts")) / "hadolint", "--failure-threshold", "style", DOCKER / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_container_serves_as_a_numbered_user_and_hears_sigterm() -> None:
    image = rehearse.read_image(DOCKER / "Dockerfile")
    assert image.user > 0
    assert image.stop_signal.name == "SIGTERM"
    assert image.entrypoint == ["hbll", "serve", "/models", "--host", "0.0.0.0"]
    assert "/health/ready" in image.health[-1]


def test_only_what_the_wheel_is_made_of_enters_a_build(tmp_path: Path) -> None:
    """A tree with everything that lies about in one; new folders stay out until `.dockerignore` names them."""
    kept = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "docker/install.sh"}
    kept |= {f"{package}/__init__.py" for package in ("family", "training", "export", "service", "hbll")}
    kept |= {"training/configs/digits.toml", "service/deeper/module.py"}
    left = {".git/HEAD", ".env", "Makefile", "docker/Dockerfile", "docker/rehearse.py", "models/digits/1/weights.bin"}
    left |= {"runs/a/checkpoint.safetensors", "tests/conftest.py", ".venv/bin/python", "service/__pycache__/app.pyc"}
    left |= {"training/deep/__pycache__/a.pyc", "family.txt", "hbll.py", "sub/hbll/cli.py"}
    for name in kept | left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    assert {path.as_posix() for path in rehearse.context_files(tmp_path)} == kept


def test_what_the_build_needs_is_there() -> None:
    files = {path.as_posix() for path in rehearse.context_files(ROOT)}
    assert {
        "hbll/cli.py",
        "service/app.py",
        "family/tree.py",
        "docker/install.sh",
        "constraints.txt",
        "pyproject.toml",
    } <= files


def test_compose_hardens_and_limits_every_container() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert ":latest" not in service["image"], name
        assert ":" in service["image"], name


def test_compose_waits_for_the_drain_and_leaves_the_event_loop_a_core() -> None:
    server = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["server"]
    assert int(server["stop_grace_period"].removesuffix("s")) > Settings.model_fields["drain_s"].default
    assert int(server["environment"]["HBLL_THREADS"]) + 1 == int(server["deploy"]["resources"]["limits"]["cpus"])


def test_prometheus_does_not_wait_for_the_server_whose_alerts_it_has() -> None:
    """Bug found: of a server that did not become ready at start-up there was no alert, because nobody watched it yet."""
    assert "depends_on" not in yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["prometheus"]


def test_every_file_that_compose_mounts_is_in_the_repository() -> None:
    for service in yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"].values():
        for source in (volume.split(":")[0] for volume in service["volumes"]):
            assert not source.startswith("./") or (DOCKER / source).exists(), source


def test_the_gpu_override_changes_the_server_alone_and_insists_on_a_gpu() -> None:
    services = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())["services"]
    assert set(services) == {"server"}
    assert services["server"]["build"]["args"] == {"RUNTIME": "gpu"}
    assert services["server"]["command"] == ["--device", "gpu"]
