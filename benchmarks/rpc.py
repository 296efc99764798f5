"""How the server keeps budgets over gRPC, up to more calls than it can answer.

    python -m benchmarks.rpc [models-folder] [--rates 500,1000,1500,2000,2500]

An open loop, as over HTTP (`benchmarks.load`): calls are sent at their times by gRPC's own client, whatever has become of
those before them, and latency counts from then. Rates are per second; which the machine can answer shows in the table.
Rates of which the client was late with more than 1 % say something about the client. Needs the extra `grpc`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import click
import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.alarm import Alarm
from benchmarks.live import DEFAULT_MODELS, free_port, only_bundle, serve
from benchmarks.outcomes import digits_of
from benchmarks.priority import first_in_line
from benchmarks.traces import Arrivals, poisson
from family.manifest import Manifest
from service.oip.rpc.names import INFERENCE
from service.oip.rpc.stubs import open_inference_pb2 as pb
from service.policy import DEFAULT_POLICY
from training.dataset import Split

_Ask: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]"  # generic for mypy alone

_CHANNELS = 8
_TIMEOUT_S = 30.0
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)  # else all channels share one


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of a call: `code` is "ok" or the error's, `late_s` how late it was sent."""

    code: str
    latency_s: float
    late_s: float
    depth: int = 0
    right: bool = False


@click.command()
@click.argument("models", type=click.Path(path_type=Path, exists=True, file_okay=False), default=DEFAULT_MODELS)
@click.option("--rates", default="500,1000,1500,2000,2500", show_default=True, help="Calls a second, one after the other.")
@click.option("--budget-ms", default=30.0, show_default=True, help="Of every call.")
@click.option("--seconds", default=4.0, show_default=True, help="Of each rate, and of each round.")
@click.option("--rounds", default=3, show_default=True, help="How often each rate is tried.")
@click.option("--policy", default=DEFAULT_POLICY, show_default=True)
def main(models: Path, rates: str, budget_ms: float, seconds: float, rounds: int, policy: str) -> None:
    """Load a server of the one model in the folder MODELS, and report who had an answer in time."""
    _, manifest = only_bundle(models)
    test, port = digits_of(manifest), free_port()
    table = Table(title=f"{policy} over gRPC, budgets of {budget_ms:g} ms: % of all calls, over the rounds")
    for column in ("calls/s", "in time", "of a round", "right", "blocks", "median ms", "99 % ms", "client late", "codes"):
        table.add_column(column, justify="left" if column == "codes" else "right", no_wrap=True)
    with serve(models, policy, HBLL_GRPC_PORT=str(port)) as server, first_in_line():
        calls = _calls(server.model, manifest, test, budget_ms)
        for rate in map(float, rates.split(",")):
            found = [
                asyncio.run(_play(f"127.0.0.1:{port}", calls, poisson(rate, seconds, seed), seed)) for seed in range(rounds)
            ]
            table.add_row(f"{rate:g}", *_row(found, budget_ms / 1000))
    Console(width=140).print(table)


def _calls(model: str, manifest: Manifest, test: Split, budget_ms: float) -> list[tuple[bytes, bytes]]:
    """A call for each test image, as bytes, and its label."""
    calls = []
    for image, label in zip(test.x.numpy(), test.labels.tolist(), strict=True):
        message = pb.ModelInferRequest(model_name=model, raw_input_contents=[image.astype("<f4").tobytes()])
        message.inputs.add(name=manifest.input.name, datatype=manifest.input.datatype, shape=[1, *image.shape])
        message.outputs.add(name="label")
        message.parameters["latency_budget_ms"].double_param = budget_ms
        calls.append((message.SerializeToString(), str(label).encode()))
    return calls


async def _play(address: str, calls: Sequence[tuple[bytes, bytes]], arrivals: Arrivals, seed: int) -> list[Answered]:
    """Send calls at their times; which ones, the seed says."""
    images = np.random.default_rng(seed).integers(len(calls), size=len(arrivals)).tolist()
    channels = [grpc.aio.insecure_channel(address, options=_OWN_CONNECTION) for _ in range(_CHANNELS)]
    asks: list[_Ask] = [channel.unary_unary(f"/{INFERENCE}/ModelInfer") for channel in channels]
    alarm, tasks = Alarm(), []
    try:
        await asyncio.gather(*(ask(calls[0][0], wait_for_ready=True) for ask in asks))
        start_s = time.monotonic() + 0.1
        for place, (at_s, image) in enumerate(zip(arrivals.tolist(), images, strict=True)):
            await alarm.until(start_s + at_s)
            tasks.append(asyncio.ensure_future(_send(asks[place % _CHANNELS], calls[image], start_s + at_s)))
        return await asyncio.gather(*tasks)
    finally:
        alarm.close()
        for channel in channels:
            await channel.close()


async def _send(ask: _Ask, call: tuple[bytes, bytes], due_s: float) -> Answered:
    message, label = call
    late_s = time.monotonic() - due_s
    try:
        answer = await ask(message, timeout=_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        code = dict(error.trailing_metadata() or ()).get("code", error.code().name)  # the library's own errors have none
        return Answered(str(code), time.monotonic() - due_s, late_s)
    latency_s = time.monotonic() - due_s
    response = pb.ModelInferResponse.FromString(answer)
    right = response.raw_output_contents[0][4:] == label  # after its length
    return Answered("ok", latency_s, late_s, response.parameters["depth"].int64_param, right)


def _row(rounds: Sequence[Sequence[Answered]], budget_s: float) -> list[str]:
    """What became of the rounds of a rate; `of a round`: the least and the greatest."""
    calls = [call for played in rounds for call in played]
    in_time = [call for call in calls if call.code == "ok" and call.latency_s <= budget_s]
    latencies_ms = [1000 * call.latency_s for call in calls if call.code == "ok"]
    shares = [
        100 * sum(call.code == "ok" and call.latency_s <= budget_s for call in played) / len(played) for played in rounds
    ]
    codes = Counter(call.code for call in calls)
    return [
        f"{100 * len(in_time) / len(calls):.1f}",
        f"{min(shares):.1f} - {max(shares):.1f}",
        f"{100 * sum(call.right for call in in_time) / len(calls):.1f}",
        f"{np.mean([call.depth for call in in_time]):.2f}" if in_time else "-",
        *(f"{value:.1f}" if latencies_ms else "-" for value in np.percentile(latencies_ms or [0.0], (50, 99))),
        f"{100 * sum(call.late_s > 0.001 for call in calls) / len(calls):.1f} %",
        ", ".join(f"{code} {count}" for code, count in codes.most_common()),
    ]


if __name__ == "__main__":
    main()
