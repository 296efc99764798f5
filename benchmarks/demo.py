"""`make demo`: train, export, serve and ask, on real digits, with the commands and the HTTP interface that users have."""

from __future__ import annotations

import base64
import io
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import httpx
from PIL import Image
from rich.console import Console
from rich.table import Table

from training.dataset import Split
from training.digits import load_digits

console = Console()

RUN, MODELS = Path("runs/digits"), Path("models")
CONFIG = Path(__file__).parents[1] / "training" / "configs" / "digits.toml"
SHIFT = 4
SAMPLES = 8
READY_S = 120
PREDICT = "/v1/models/digits/predict"
WISHES: dict[str, dict[str, Any]] = {
    "1 block": {"depth": 1},
    "3 blocks": {"depth": 3},
    "best": {"depth": "best"},
    "budget 5 ms": {"latency_budget_ms": 5},
    "confidence 0.9": {"min_confidence": 0.9},
}


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--once", is_flag=True, help="Exit after the answers instead of serving on.")
@click.option("--config", type=click.Path(path_type=Path, exists=True), default=CONFIG, help="What to train.")
def main(port: int, once: bool, config: Path) -> None:
    """From nothing to a served anytime model, and what it answers."""
    require_free(port)
    began = time.monotonic()
    hbll("train", "--config", str(config), "--out", str(RUN), "--resume")
    hbll("export", str(RUN), str(MODELS / "digits" / "1"), "--replace")
    command = [sys.executable, "-m", "hbll", "serve", str(MODELS), "--port", str(port)]
    console.print(f"\n[bold]$ hbll {' '.join(command[3:])}")
    with subprocess.Popen(command) as server:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                wait_until_ready(client, server)
                test = load_digits(SHIFT).test
                console.print(paths_table(client, test))
                console.print(answers_table(client, test))
                console.print(f"[bold]all of that took {time.monotonic() - began:.0f} s\n")
                sample = RUN / "sample.png"
                sample.write_bytes(png(test, 0))
                if not once:
                    show_how_to_ask(f"http://127.0.0.1:{port}", sample)
                    server.wait()
        except KeyboardInterrupt:
            console.print("stopping the server")
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGTERM)


def hbll(*arguments: str) -> None:
    """Run a command as a user would, and stop the demo if it fails."""
    console.print(f"\n[bold]$ hbll {' '.join(arguments)}")
    status = subprocess.run([sys.executable, "-m", "hbll", *arguments], check=False).returncode
    if status:
        raise click.ClickException(f"`hbll {arguments[0]}` ended with status {status}")


def require_free(port: int) -> None:
    """Do not talk to another server that listens there already."""
    with socket.socket() as taken:
        if taken.connect_ex(("127.0.0.1", port)) == 0:
            raise click.ClickException(f"something listens on port {port} already: stop it, or choose another (PORT=...)")


def wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    """Poll the readiness probe until it says yes."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise click.ClickException(
                f"the server ended with status {server.returncode} (is port {client.base_url.port} free?)"
            )
        try:
            if client.get("/health/ready").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise click.ClickException(f"the server did not become ready in {READY_S} s")


def paths_table(client: httpx.Client, test: Split) -> Table:
    """The best path of each depth, with the latency of the inference and of the whole request."""
    table = Table(title="the best path of each depth: test accuracy and latency, one digit a request")
    for column in ("path", "depth", "test accuracy", "inference", "HTTP round trip", ""):
        table.add_column(column, justify="left" if column in ("path", "") else "right")
    model = client.get("/v1/models/digits").json()
    body = {"inputs": [image_input(test, 0)]}
    for path in model["paths"]:
        if not path["best_of_depth"]:
            continue
        round_trip_s = statistics.median(timed(client, body | {"path": path["path"]}) for _ in range(20))
        table.add_row(
            path["path"],
            str(path["depth"]),
            f"{100 * path['test_accuracy']:.1f} %",
            f"{path['latency_ms']:.2f} ms",
            f"{1000 * round_trip_s:.1f} ms",
            "reference" if path["path"] == model["reference"] else "Pareto" if path["pareto"] else "",
        )
    return table


def answers_table(client: httpx.Client, test: Split) -> Table:
    """Real test digits by different wishes: label (confidence, depth)."""
    table = Table(title="answers to real test digits: label (confidence, depth)")
    table.add_column("digit", justify="right")
    for name in WISHES:
        table.add_column(name, justify="right")
    inputs = [image_input(test, index) for index in range(SAMPLES)]
    for index, image in enumerate(inputs):
        truth = str(test.labels[index].item())
        responses = [client.post(PREDICT, json={"inputs": [image], **wish}) for wish in WISHES.values()]
        table.add_row(truth, *(cell(response, truth) for response in responses))
    return table


def cell(response: httpx.Response, truth: str) -> str:
    """One answer, green if right; a request may be refused, as one whose budget ran out is."""
    if response.is_error:
        return f"[yellow]{response.json()['code']}"
    (row,) = response.json()["predictions"]
    colour = "green" if row["label"] == truth else "red"
    return f"[{colour}]{row['label']}[/] ({row['confidence']:.2f}, {row['depth']})"


def show_how_to_ask(url: str, sample: Path) -> None:
    """Print commands that ask about the digit in a file."""
    console.print(f"serving on {url} (Ctrl-C stops); interactive documentation: {url}/docs\n")
    print(  # noqa: T201  a line to paste, which no terminal width may break
        f"curl -s {url}/v1/models/digits/predict -H 'content-type: application/json' "
        f'-d \'{{"latency_budget_ms": 5, "inputs": [{{"image": "\'$(base64 < {sample} | tr -d "\\n")\'"}}]}}\'\n'
        f".venv/bin/hbll predict {sample} --model digits --budget-ms 5 --url {url}"
    )


def ask(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """One request; anything but a success ends the demo with the server's words."""
    response = client.post(PREDICT, json=body)
    if response.is_error:
        raise click.ClickException(f"the server answered {response.status_code}: {response.text}")
    answer: dict[str, Any] = response.json()
    return answer


def timed(client: httpx.Client, body: dict[str, Any]) -> float:
    """Seconds of one request, as the client sees them."""
    start = time.perf_counter()
    ask(client, body)
    return time.perf_counter() - start


def png(test: Split, index: int) -> bytes:
    """A test digit as a PNG file."""
    file = io.BytesIO()
    Image.fromarray((test.x[index].numpy() * 255).round().astype("uint8")).save(file, "PNG")
    return file.getvalue()


def image_input(test: Split, index: int) -> dict[str, str]:
    """A test digit as clients send images."""
    return {"image": base64.b64encode(png(test, index)).decode()}


if __name__ == "__main__":
    main()
