"""What many tests share: the digits, and one small family trained for a moment on them and exported."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, settings

from benchmarks.live import free_port
from export.bundle import export_bundle
from family.manifest import Manifest, load_manifest
from training.checkpoint import load_family, load_origin
from training.config import RunConfig, TrainConfig, VitConfig
from training.dataset import Dataset
from training.digits import load_digits
from training.trainer import train

# How fast a shared machine makes up examples says nothing about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

SMALL_VIT = VitConfig(hierarchy_depth=3, patch=14, width=16, heads=2, hidden=16, exit_heads=True)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers keep what they measure here, not in the home of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_digits(shift=4)


@dataclass(frozen=True)
class Trained:
    """A run's folder and the model repository with its bundle in `models/digits/1`."""

    run: Path
    models: Path

    @property
    def bundle(self) -> Path:
        return self.models / "digits" / "1"

    @property
    def manifest(self) -> Manifest:
        return load_manifest(self.bundle)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    config = RunConfig(model=SMALL_VIT, train=TrainConfig(method="chains", budget=30, evaluations=2))
    train(config, root / "run", digits, lambda _: None)
    config, family, progress = load_family(root / "run")
    export_bundle(config, family, progress, load_origin(root / "run"), digits, root / "models" / "digits" / "1")
    return Trained(root / "run", root / "models")


def wait_for(happened: Callable[[], bool], patience_s: float = 40) -> None:
    """Wait for what another process or thread does, which has no other way to tell us."""
    deadline_s = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < deadline_s, f"it has not happened within {patience_s} s"
        time.sleep(0.01)


@dataclass
class LiveServer:
    """A real `hbll serve` process; a context manager, which stops it unless the test did."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def __enter__(self) -> LiveServer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            assert self.stop() in (0, -signal.SIGTERM)

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@pytest.fixture(scope="session")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with start_server(trained.models, tmp_path_factory.mktemp("server")) as live:
        yield live


def start_server(
    models: Path,
    folder: Path,
    settings: dict[str, str] | None = None,
    until: str = "ready",
    trust: ssl.SSLContext | None = None,
    module: str = "hbll",
) -> LiveServer:
    """Start `hbll serve` on a free port and wait until it says that it is ready (or live); by TLS if there is `trust`."""
    port = free_port()
    log = folder / "server.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HBLL_")}
    command = [sys.executable, "-m", module, "serve", str(models), "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment | (settings or {})
        )
    live = LiveServer(process, f"{'https' if trust else 'http'}://127.0.0.1:{port}", log)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{live.url}/health/{until}", verify=trust or True).status_code == 200:
                return live
        except httpx.TransportError:
            pass
        time.sleep(0.05)  # polls another process, which has no other way to tell us
    process.kill()
    process.wait()
    raise AssertionError(f"the server did not become ready:\n{log.read_text()}")
