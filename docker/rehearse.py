"""Performs the image's steps without a container engine and watches the server that comes out.

It copies what `.dockerignore` lets through, runs the build script of the Dockerfile, and starts the Dockerfile's own
ENTRYPOINT with its ENV and USER: as root on Linux with a read-only root filesystem, without privileges and as process 1,
which is what a container engine does; elsewhere as the calling user, in a folder that nobody may write. What it cannot
rehearse are the base images. Usage: python docker/rehearse.py [MODELS]
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
START_S, STOP_S = 120, 20

console = Console(highlight=False)


@dataclass(frozen=True)
class Image:
    """What the last stage of a Dockerfile says about the container."""

    environment: dict[str, str]
    user: int
    stop_signal: signal.Signals
    health: list[str]
    entrypoint: list[str]


def read_image(dockerfile: Path) -> Image:
    """Read the last stage; ENTRYPOINT and HEALTHCHECK must be in exec form."""
    lines = (line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    text = "\n".join(lines).replace("\\\n", " ")
    last_stage = re.split(r"^FROM .*$", text, flags=re.MULTILINE)[-1]
    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in last_stage.splitlines() if line.strip()}
    return Image(
        environment=dict(item.split("=", 1) for item in shlex.split(said["ENV"])),
        user=int(said["USER"].split(":")[0]),
        stop_signal=signal.Signals[said["STOPSIGNAL"]],
        health=json.loads(said["HEALTHCHECK"].split("CMD", 1)[1]),
        entrypoint=json.loads(said["ENTRYPOINT"]),
    )


def context_files(root: Path) -> Iterator[Path]:
    """The files below `root` that its `.dockerignore` lets through, relative to it; the last pattern that fits decides."""
    rules = []
    for line in (root / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").strip("/")
            regex = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
            rules.append((re.compile(rf"{regex}(?:/.*)?"), line.startswith("!"), pattern))

    def passes(path: str) -> bool:
        return next((kept for regex, kept, _ in reversed(rules) if regex.fullmatch(path)), True)

    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        folders[:] = [
            name
            for name in folders
            if passes(path := (here / name).as_posix())
            or any(kept and pattern.startswith(f"{path}/") for _, kept, pattern in rules)
        ]
        yield from (here / name for name in files if passes((here / name).as_posix()))


@click.command()
@click.argument("models", type=click.Path(path_type=Path, exists=True, file_okay=False), default="models")
def main(models: Path) -> None:
    """Build, start, ask and stop the server of docker/Dockerfile, serving the model repository MODELS."""
    image = read_image(ROOT / "docker/Dockerfile")
    with tempfile.TemporaryDirectory(prefix="hbll-rehearsal-") as folder:
        stage = Path(folder)
        stage.chmod(0o755)  # the server's user must be able to enter it
        shutil.copytree(models, stage / "models")
        _build(stage)
        _serve(image, stage)
    console.print("the rehearsal went well")


def _build(stage: Path) -> None:
    source, venv = stage / "src", stage / "venv"
    for file in context_files(ROOT):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    started = time.monotonic()
    python = {"PATH": f"{sys.base_prefix}/bin:{os.environ['PATH']}"}
    command: list[str | Path] = [source / "docker/install.sh", "cpu", venv]
    subprocess.run(command, cwd=source, env=os.environ | python, check=True)  # noqa: S603
    shutil.rmtree(source)  # the image does not have it either
    size = sum(file.stat().st_size for file in venv.rglob("*") if file.is_file())
    console.print(f"built in {time.monotonic() - started:.0f} s: {size / 1e6:.0f} MB")
    for module in ("torch", "onnx", "pip", "pytest"):
        command = [venv / "bin/python", "-c", f"import {module}"]
        done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603
        _expect(done.returncode != 0, f"{module} is not in it")


def _serve(image: Image, stage: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    scratch, locked, log = stage / "tmp", stage / "locked", stage / "server.log"
    scratch.mkdir()
    scratch.chmod(0o777)
    locked.mkdir(mode=0o555)
    environment = image.environment | {
        "PATH": image.environment["PATH"].replace("/opt/hbll", str(stage / "venv")).replace("$PATH", os.defpath),
        "HOME": "/nonexistent",
        "TMPDIR": str(scratch),
    }
    serve = [word.replace("/models", str(stage / "models")) for word in image.entrypoint] + ["--port", port]
    health = [word.replace("8000", port) for word in image.health]
    contained = os.geteuid() == 0 and sys.platform == "linux"
    if contained:
        serve, health = _contain(serve, image.user, stage), _contain(health, image.user, stage)
    # env looks bare names up in the image's PATH; subprocess would take ours.
    serve, health = ["/usr/bin/env", *serve], ["/usr/bin/env", *health]
    around: dict[str, Any] = {"env": environment, "cwd": locked}

    def is_healthy() -> bool:
        done = subprocess.run(health, capture_output=True, check=False, timeout=30, **around)  # noqa: S603
        return done.returncode == 0

    _expect(not is_healthy(), "the health check fails without a server")
    with log.open("w") as output:
        process = subprocess.Popen(serve, stdout=output, stderr=subprocess.STDOUT, **around)  # noqa: S603
    try:
        started = time.monotonic()
        while not is_healthy():
            if process.poll() is not None or time.monotonic() > started + START_S:
                raise click.ClickException(f"the server did not become healthy:\n{log.read_text()}")
            time.sleep(0.1)
        console.print(f"healthy after {time.monotonic() - started:.1f} s")
        server = _child(process.pid) if contained else process.pid
        if contained:
            _expect_confinement(server, image.user)
        _ask(f"http://127.0.0.1:{port}")
        os.kill(server, image.stop_signal)
        status = process.wait(timeout=STOP_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    # uvicorn raises the signal again when it has shut down: that ends an ordinary process, and not process 1.
    allowed = {0} if contained else {0, -image.stop_signal}
    _expect(status in allowed, f"{image.stop_signal.name} ends it with status {status}")
    _expect("Application shutdown complete" in log.read_text(), "it shut down in order")


def _contain(command: list[str], user: int, stage: Path) -> list[str]:
    """The command that runs `command` as a container engine would; $TMPDIR is the one place where it may write."""
    steps = ['mount -t tmpfs -o mode=1777 tmpfs "$TMPDIR"']
    python = Path(sys.base_prefix)
    closed = [folder for folder in reversed(python.parents) if not folder.stat().st_mode & 0o001]
    if closed:  # an interpreter in root's home: nobody else may go there, so show it to the server's user alone
        aside = stage / "python"
        aside.mkdir(exist_ok=True)
        home, shown, hidden = (shlex.quote(str(folder)) for folder in (python, aside, closed[0]))
        steps += [
            f"mount --bind {home} {shown}",
            f"mount -t tmpfs -o mode=755 tmpfs {hidden}",
            f"mkdir -p {home}",
            f"mount --bind {shown} {home}",
        ]
    steps += ["mount -o remount,bind,ro /", 'exec "$@"']
    drop = [f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
    alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    return [*alone, "sh", "-c", " && ".join(steps), "sh", "setpriv", *drop, *command]


def _ask(url: str) -> None:
    with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
        name = client.get("/v1/models").json()["models"][0]["name"]
        row: Any = 0.5
        for length in reversed(client.get(f"/v1/models/{name}").json()["input_shape"]):
            row = [row] * length
        answer = client.post(f"/v1/models/{name}/predict", json={"inputs": [row], "depth": 1})
        _expect(answer.status_code == 200, f"{name} answers {answer.status_code}: {answer.text}")
        _expect("\nhbll_ready 1.0\n" in client.get("/metrics").text, "the metrics say that it is ready")


def _child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def _expect_confinement(pid: int, user: int) -> None:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    _expect(set(status["Uid"].split()) == {str(user)}, f"it runs as user {user}")
    _expect(status["NSpid"].split()[-1] == "1", "it is process 1")
    _expect(int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, "it has no capabilities")
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    root = [fields[5].split(",") for fields in mounts if fields[4] == "/"]
    _expect("ro" in root[-1], "its root filesystem is read-only")


def _expect(fact: bool, claim: str) -> None:
    if not fact:
        raise click.ClickException(f"not so: {claim}")
    console.print(f"[green]ok[/] {claim}")


if __name__ == "__main__":
    main()
