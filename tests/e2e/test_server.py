"""A real uvicorn process, a real HTTP client, the real command line."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.conftest import LiveServer, Trained, start_server
from training.dataset import Dataset

GOOD = [[0.5] * 28] * 28


def hbll(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hbll", *map(str, arguments)]
    environment = {"COLUMNS": "140", "PATH": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


@pytest.fixture
def image(tmp_path: Path, digits: Dataset) -> Path:
    file = tmp_path / "digit.png"
    Image.fromarray((digits.test.x[0].numpy() * 255).astype("uint8")).save(file)
    return file


def test_predict_asks_a_running_server(server: LiveServer, image: Path) -> None:
    done = hbll("predict", image, "--budget-ms", 5000, "--url", server.url)
    assert done.returncode == 0, done.stderr
    assert "digit.png" in done.stdout
    assert "deadline met" in done.stdout
    assert "complete" in done.stdout
    done = hbll("predict", image, image, "--depth", 2, "--url", server.url, "--model", "digits")
    assert done.stdout.count("digit.png") == 2


def test_predict_shows_a_stream_rung_by_rung(server: LiveServer, image: Path) -> None:
    done = hbll("predict", image, "--url", server.url, "--stream")
    assert done.returncode == 0, done.stderr
    climb = httpx.get(f"{server.url}/v1/models/digits").json()["climb"]
    shown = [line.rpartition("path ")[2] for line in done.stdout.splitlines() if line.startswith("digit.png: ")]
    assert shown == climb
    assert "digits version 1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--depth", "9"), "the server answered 422: depth 9 is not offered"),
        (("--path", "4-7"), "4 -> 7 is no hop"),
        (("--model", "cats"), "no model 'cats' is served here: expected one of digits"),
    ],
)
def test_predict_passes_on_what_the_server_says(
    server: LiveServer, image: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = hbll("predict", image, "--url", server.url, *arguments)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_predict_without_a_server_says_how_to_start_one(image: Path) -> None:
    with socket.socket() as nobody:  # bound and not listening
        nobody.bind(("127.0.0.1", 0))
        done = hbll("predict", image, "--url", f"http://127.0.0.1:{nobody.getsockname()[1]}")
    assert done.returncode == 1
    assert "Start one with `hbll serve`" in " ".join(done.stderr.split())


def test_many_clients_at_once_all_get_their_own_answer(server: LiveServer, digits: Dataset) -> None:
    """Answers under load are those of a quiet server, whoever shares a batch."""
    images = [image.tolist() for image in digits.test.x[:24]]
    wishes = [{"depth": 1}, {"depth": 3}, {"min_confidence": 0.5}, {}]

    with httpx.Client(base_url=server.url, timeout=60) as client:

        def ask(number: int) -> dict[str, object]:
            body = {"inputs": [images[number % 24]], **wishes[number % 4]}
            response = client.post("/v1/models/digits/predict", json=body)
            assert response.status_code == 200, response.text
            return response.json()["predictions"][0]

        alone = [ask(number) for number in range(24)]
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(ask, range(480)))
    for number, row in enumerate(together):
        expected = alone[number % 24]
        assert (row["label"], row["path"], row["stopped_by"]) == (
            expected["label"],
            expected["path"],
            expected["stopped_by"],
        )
        assert row["confidence"] == pytest.approx(expected["confidence"], abs=1e-5)


def test_half_a_body_and_a_hang_up_do_not_disturb_others(server: LiveServer) -> None:
    port = httpx.URL(server.url).port
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /v1/models/digits/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert httpx.post(f"{server.url}/v1/models/digits/predict", json={"inputs": [GOOD]}).status_code == 200


def test_sigterm_does_not_wait_for_ever_for_a_client_that_holds_half_a_body(trained: Trained, tmp_path: Path) -> None:
    server = start_server(trained.models, tmp_path)
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as connection:
        connection.sendall(
            b"POST /v1/models/digits/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        assert httpx.get(f"{server.url}/health/live").status_code == 200  # so the half request has been read before
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=30)


def test_sigterm_does_not_wait_for_ever_for_a_run_that_hangs(trained: Trained, tmp_path: Path) -> None:
    """It did, and clients got no answer."""
    server = start_server(trained.models, tmp_path, {"HBLL_DRAIN_S": "1"}, module="benchmarks.faulty")
    server.process.send_signal(signal.SIGUSR2)
    with ThreadPoolExecutor() as pool:
        stuck = pool.submit(httpx.post, f"{server.url}/v1/models/digits/predict", json={"inputs": [GOOD]}, timeout=60)
        while httpx.get(f"{server.url}/health/ready").status_code == 200:
            time.sleep(0.1)  # another process, which has no other way to tell us
        server.process.send_signal(signal.SIGTERM)
        assert stuck.result().status_code == 503
        assert stuck.result().json()["code"] == "not_ready"
    assert server.process.wait(timeout=60) == 0
    assert "a run hangs: the server ends without it" in server.log.read_text()


def test_tight_limits_do_not_keep_a_server_from_becoming_ready(trained: Trained, tmp_path: Path) -> None:
    """The server's own warm-up requests are refused here, and that must not matter."""
    settings = {"HBLL_DEFAULT_LATENCY_BUDGET_MS": "0.1", "HBLL_MAX_BODY_BYTES": "2048", "HBLL_MAX_IMAGE_PIXELS": "100"}
    server = start_server(trained.models, tmp_path, settings)
    assert server.stop() in (0, -15)


def test_sigterm_during_the_warm_up_ends_the_server_soon(trained: Trained, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name in ("a", "b", "c", "d", "e", "f"):
        shutil.copytree(trained.bundle, models / name / "1")
    server = start_server(models, tmp_path, until="live")
    assert httpx.get(f"{server.url}/health/ready").status_code == 503
    assert server.stop() in (0, -15)
    assert "Traceback" not in server.log.read_text()


def test_sigterm_ends_the_server_in_order(trained: Trained, tmp_path: Path) -> None:
    server = start_server(trained.models, tmp_path)
    assert httpx.get(f"{server.url}/health/live").json() == {"live": True}
    assert server.stop() in (0, -15)  # uvicorn raises the signal again after it has shut down
    log = server.log.read_text()
    assert "Application shutdown complete" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bundle: (bundle / "weights.bin").write_bytes(b"short"), "weights.bin is truncated or changed"),
        (lambda bundle: (bundle / "path_4.onnx").unlink(), "path_4.onnx cannot be read"),
        (
            lambda bundle: (bundle / "manifest.json").write_text(
                (bundle / "manifest.json").read_text().replace('"accuracy"', '"accuracy" ', 1).replace("0.", "0.9", 1)
            ),
            "manifest.json was edited or damaged",
        ),
    ],
    ids=["truncated weights", "missing file", "edited manifest"],
)
def test_the_server_does_not_start_on_a_damaged_bundle(trained: Trained, tmp_path: Path, damage, message: str) -> None:
    bundle = tmp_path / "models" / "digits" / "1"
    shutil.copytree(trained.bundle, bundle)
    damage(bundle)
    done = hbll("serve", tmp_path / "models", "--port", 0)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_bad_setting_stops_start_up_and_is_named(trained: Trained) -> None:
    command = [sys.executable, "-m", "hbll", "serve", str(trained.models)]
    for variable, value, message in (
        (
            "HBLL_MAX_BATCH",
            "many",
            "wrong setting: max_batch (environment HBLL_MAX_BATCH): Input should be a valid integer",
        ),
        ("HBLL_MAX_BACTH", "8", "wrong setting: unknown variable HBLL_MAX_BACTH: expected some of HBLL_ACCESS_LOG"),
        ("HBLL_MAX_QUEUE_ROWS", "10", "max_request_rows must be at most max_queue_rows, got 256 and 10"),
    ):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=120, env={variable: value, "COLUMNS": "500"}
        )
        assert done.returncode == 1
        assert message in done.stderr


def test_inspect_and_verify_show_a_whole_bundle(trained: Trained) -> None:
    done = hbll("inspect", trained.bundle)
    assert done.returncode == 0, done.stderr
    assert "1-2-3-4-5-6-7" in done.stdout
    assert "(ref.)" in done.stdout
    done = hbll("verify", trained.bundle, "--checkpoint", trained.run)
    assert done.returncode == 0, done.stderr
    assert "25 paths agree in all forms" in done.stdout


def test_evaluate_scores_every_path(trained: Trained, tmp_path: Path) -> None:
    done = hbll("evaluate", trained.run, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Climbing until 90 % confident" in done.stdout
    assert (tmp_path / "metrics.json").exists()
    for name in ("accuracy.png", "reliability.png", "tree.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 400
