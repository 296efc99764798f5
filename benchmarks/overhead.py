"""Processor time per request of the server, against a bare FastAPI route that runs the same session on the same body.

    python -m benchmarks.overhead models-folder

Closed-loop clients on keep-alive connections, raw bodies of one row, depth 1. The two servers are asked in turn, and the
ratio of the medians is what is told: the machine may be shared.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.live import Server, serve
from family.manifest import load_manifest
from family.tree import format_path


@click.command()
@click.argument("models", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--seconds", default=3.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=7, show_default=True, help="How often each server is measured.")
def main(models: Path, seconds: float, rounds: int) -> None:
    """Compare the server of the one model in the folder MODELS with a bare route."""
    (bundle,) = models.glob("*/*")
    manifest = load_manifest(bundle)
    body = np.random.default_rng(0).random(manifest.input.shape[1:], dtype=np.float32).tobytes()
    table = Table(title="processor time per request, ms (median over the rounds), and round trips a second")
    for column in ("clients", "engine", "bare route", "ratio", "engine 1/s", "bare 1/s"):
        table.add_column(column, justify="right")
    with serve(models, "ladder-edf") as engine, _serve_bare(bundle) as bare:
        path = format_path(manifest.front[0])
        targets = {engine: f"/v1/models/{engine.model}/predict?path={path}", bare: "/predict"}
        for clients in (1, 32):
            cpu: dict[Server, list[float]] = {engine: [], bare: []}
            rates: dict[Server, list[float]] = {engine: [], bare: []}
            for _ in range(rounds):
                for server, target in targets.items():
                    before_s = server.cpu_s
                    answered = asyncio.run(_closed_loop(server, target, body, clients, seconds))
                    cpu[server].append(1000 * (server.cpu_s - before_s) / answered)
                    rates[server].append(answered / seconds)
            ours, theirs = np.median(cpu[engine]), np.median(cpu[bare])
            table.add_row(
                str(clients),
                f"{ours:.3f}",
                f"{theirs:.3f}",
                f"{ours / theirs:.2f}",
                f"{np.median(rates[engine]):.0f}",
                f"{np.median(rates[bare]):.0f}",
            )
    Console().print(table)


async def _closed_loop(server: Server, target: str, body: bytes, clients: int, seconds: float) -> int:
    """How many requests were answered: every client sends its next one when it has its answer."""
    lines = (f"POST {target} HTTP/1.1", "Host: x", "Content-Type: application/octet-stream", f"Content-Length: {len(body)}")
    message = "\r\n".join((*lines, "", "")).encode() + body
    until_s = time.monotonic() + seconds

    async def client() -> int:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        count = 0
        while time.monotonic() < until_s:
            writer.write(message)
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{server.policy} answered {answer[:200]!r}")
            length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            count += 1
        writer.close()
        return count

    return sum(await asyncio.gather(*(client() for _ in range(clients))))


@contextmanager
def _serve_bare(bundle: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--factory", "benchmarks.bare:create_app", "--no-access-log"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--log-level", "warning"], env=os.environ | {"BUNDLE": str(bundle)}
    )
    try:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            try:
                httpx.get(f"http://127.0.0.1:{port}/docs")
                break
            except httpx.TransportError:
                time.sleep(0.1)  # another process, which has no other way to tell us
        yield Server("bare", "127.0.0.1", port, "", process)
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
