"""Processor time per request of the server: against a bare FastAPI route that runs the same session on the same body; and
of the Open Inference Protocol with binary tensors against raw bodies, in one server.

    python -m benchmarks.overhead models-folder

Closed-loop clients on keep-alive connections, one row, the shallowest path. What is compared is asked in turn, and the
ratio of the medians is what is told: the machine may be shared. The protocol's requests are tritonclient's: one that names
no output gets all seven, in binary, the other the label alone.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.live import Server, free_port, only_bundle, serve, started
from family.tree import format_path
from service.policy import DEFAULT_POLICY


@click.command()
@click.argument("models", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--seconds", default=3.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=7, show_default=True, help="How often each is measured.")
def main(models: Path, seconds: float, rounds: int) -> None:
    """Compare the server of the one model in the folder MODELS with a bare route, and its protocols with each other."""
    bundle, manifest = only_bundle(models)
    x = np.random.default_rng(0).random((1, *manifest.input.shape[1:]), dtype=np.float32)
    path = format_path(manifest.front[0])
    with serve(models, DEFAULT_POLICY) as ours, _serve_bare(bundle) as bare:
        engine = Asked("engine", ours, _raw(f"/v1/models/{ours.model}/predict?path={path}", x))
        oip = [_oip(ours, manifest.input.name, x, path, outputs) for outputs in ((), ("label",))]
        table = Table(title="processor time per request, ms (median over the rounds), and round trips a second")
        for column in ("clients", "asked", "ms", "1/s", "compared with", "ms", "1/s", "ratio"):
            table.add_column(column, justify="left" if column in ("asked", "compared with") else "right", no_wrap=True)
        for clients in (1, 32):
            pairs = [(engine, Asked("bare route", bare, _raw("/predict", x))), *((each, engine) for each in oip)]
            for asked, base in pairs:
                _compare(table, asked, base, clients, seconds, rounds)
    Console(width=100).print(table)


@dataclass(frozen=True)
class Asked:
    """A request, whole as it goes over the wire, and who is sent it."""

    name: str
    server: Server
    message: bytes


def _raw(target: str, x: NDArray[np.float32]) -> bytes:
    return _post(target, {"Content-Type": "application/octet-stream"}, x.tobytes())


def _oip(server: Server, name: str, x: NDArray[np.float32], path: str, outputs: tuple[str, ...]) -> Asked:
    """As tritonclient asks."""
    tensor = triton.InferInput(name, x.shape, "FP32").set_data_from_numpy(x)
    wanted = [triton.InferRequestedOutput(output) for output in outputs]
    body, length = triton.InferenceServerClient.generate_request_body(
        [tensor], outputs=wanted or None, parameters={"path": path}
    )
    headers = {"Inference-Header-Content-Length": str(length)}
    message = _post(f"/v2/models/{server.model}/infer", headers, body)
    return Asked(f"OIP, {', '.join(outputs) or 'all outputs'}", server, message)


def _post(target: str, headers: dict[str, str], body: bytes) -> bytes:
    named = {"Host": "x", **headers, "Content-Length": str(len(body))}
    lines = [f"POST {target} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def _compare(table: Table, asked: Asked, base: Asked, clients: int, seconds: float, rounds: int) -> None:
    """Ask both in turn, and add the row that tells of it."""
    cpu_ms: dict[Asked, list[float]] = {asked: [], base: []}
    rates: dict[Asked, list[float]] = {asked: [], base: []}
    for _ in range(rounds):
        for each in (asked, base):
            before_s = each.server.cpu_s
            answered = asyncio.run(_closed_loop(each, clients, seconds))
            cpu_ms[each].append(1000 * (each.server.cpu_s - before_s) / answered)
            rates[each].append(answered / seconds)
    medians = {each: float(np.median(cpu_ms[each])) for each in (asked, base)}
    told = [(each.name, f"{medians[each]:.3f}", f"{np.median(rates[each]):.0f}") for each in (asked, base)]
    table.add_row(str(clients), *told[0], *told[1], f"{medians[asked] / medians[base]:.2f}")


async def _closed_loop(asked: Asked, clients: int, seconds: float) -> int:
    """How many requests were answered: every client sends its next one when it has its answer."""
    until_s = time.monotonic() + seconds

    async def client() -> int:
        reader, writer = await asyncio.open_connection(asked.server.host, asked.server.port)
        count = 0
        while time.monotonic() < until_s:
            writer.write(asked.message)
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{asked.name}: {answer[:200]!r}")
            length = int(answer.lower().split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            count += 1
        writer.close()
        return count

    return sum(await asyncio.gather(*(client() for _ in range(clients))))


@contextmanager
def _serve_bare(bundle: Path) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "benchmarks.bare:create_app", "--no-access-log"]
    command += ["--port", str(port), "--log-level", "warning"]
    with started(command, os.environ | {"BUNDLE": str(bundle)}, f"http://127.0.0.1:{port}/docs") as process:
        yield Server("bare", "127.0.0.1", port, "", process)


if __name__ == "__main__":
    main()
