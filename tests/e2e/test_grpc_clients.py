"""tritonclient.grpc, unmodified, blocking and asyncio, against a real server; and how that server starts and ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.conftest import LiveServer, Trained, start_server
from tests.contract.test_grpc_errors import CASES, refused
from tests.e2e.test_oip_clients import check, tensor
from training.dataset import Dataset


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    limits = {"HBLL_MAX_BODY_BYTES": "400000", "HBLL_MAX_REQUEST_ROWS": "40", "HBLL_GRPC_PORT": "0"}
    with start_server(trained.models, tmp_path_factory.mktemp("server"), limits) as live:
        yield live


def address(server: LiveServer) -> str:
    """Where the server says that gRPC is."""
    found = re.search(r"gRPC at (\S+)", server.log.read_text())
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def images(digits: Dataset) -> np.ndarray:
    return digits.test.x[:6].numpy()


@pytest.fixture(scope="module")
def expected(server: LiveServer, images: np.ndarray) -> list[dict[str, object]]:
    """What the native protocol answers at depth 2."""
    body = {"inputs": images.tolist(), "depth": 2, "probabilities": True}
    return httpx.post(f"{server.url}/v1/models/digits/predict", json=body).json()["predictions"]


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address(server)) as client:
        yield client


def ask(images: np.ndarray) -> list[triton.InferInput]:
    return [triton.InferInput("x", list(images.shape), "FP32").set_data_from_numpy(images)]


def test_the_server_is_found_and_told(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert client.get_server_metadata().name == "hbll-anytime"
    assert list(client.get_model_metadata("digits", "1").inputs[0].shape) == [-1, 28, 28]
    assert client.get_model_config("digits").config.max_batch_size == 40
    assert [model.name for model in client.get_model_repository_index().models] == ["digits"]
    client.load_model("digits")


def test_a_model_is_unloaded_and_loaded(client: triton.InferenceServerClient, images: np.ndarray) -> None:
    """As Triton's example `simple_grpc_model_control.py` does it."""
    try:
        client.unload_model("digits", unload_dependents=True)
        assert not client.is_model_ready("digits")
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="digits was unloaded") as caught:
            client.infer("digits", ask(images))
        assert caught.value.status() == "StatusCode.NOT_FOUND"
    finally:
        client.load_model("digits")
    assert client.is_model_ready("digits")
    assert client.infer("digits", ask(images)).as_numpy("label").shape == (6,)


@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_answers_are_those_of_the_native_protocol(
    client: triton.InferenceServerClient, images: np.ndarray, expected: list[dict[str, object]], coding: str | None
) -> None:
    wishes = {"depth": 2}
    result = client.infer("digits", ask(images), request_id="42", parameters=wishes, compression_algorithm=coding)
    check(result, expected)
    assert result.get_response().id == "42"
    result = client.infer(
        "digits", ask(images), outputs=[triton.InferRequestedOutput("depth")], parameters=wishes, headers={"x-path": "4"}
    )
    assert result.as_numpy("depth").tolist() == [2] * 6
    assert result.as_numpy("label") is None


def test_both_protocols_have_the_same_bytes(
    server: LiveServer, client: triton.InferenceServerClient, images: np.ndarray
) -> None:
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as other:
        for wishes in ({"depth": 3}, {"path": "4-6-7"}, {"min_confidence": 0.3}, {}):
            ours = client.infer("digits", ask(images), parameters=wishes)
            theirs = other.infer("digits", [tensor(images)], parameters=wishes)
            for output in ("probabilities", "logits", "label", "confidence", "depth", "path", "stopped_by"):
                assert ours.as_numpy(output).tolist() == theirs.as_numpy(output).tolist(), (wishes, output)


def test_errors_and_deadlines_are_what_the_client_understands(
    client: triton.InferenceServerClient, images: np.ndarray
) -> None:
    with pytest.raises(InferenceServerException, match="no model 'cats' is served here") as caught:
        client.infer("cats", ask(images))
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="depth 9 is not offered") as caught:
        client.infer("digits", ask(images), parameters={"depth": 9})
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException, match=r"a budget of 0\.02 ms cannot be met now") as caught:
        client.infer("digits", ask(images), timeout=20, priority=1, parameters={"strict": True}, client_timeout=60)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    result = client.infer("digits", ask(images), client_timeout=60)
    assert result.get_response().parameters["deadline_met"].bool_param
    with pytest.raises(InferenceServerException, match="got 'sequence_"):
        client.infer("digits", ask(images), sequence_id=7, sequence_start=True)


def test_the_asyncio_client_gets_the_same_alone_and_by_streams(
    server: LiveServer, images: np.ndarray, expected: list[dict[str, object]]
) -> None:
    async def asked(count: int) -> AsyncIterator[dict[str, object]]:
        for number in range(count):
            yield {"model_name": "digits", "inputs": ask(images), "parameters": {"depth": 2}, "request_id": str(number)}

    async def all_of_them() -> None:
        async with triton_aio.InferenceServerClient(address(server)) as client:
            assert await client.is_model_ready("digits")
            calls = (client.infer("digits", ask(images), parameters={"depth": 2}) for _ in range(10))
            for result in await asyncio.gather(*calls):
                check(result, expected)
            found = []
            async for result, error in client.stream_infer(asked(5)):
                assert error is None
                check(result, expected)
                found.append(result.get_response().id)
            assert found == list("01234")

    asyncio.run(all_of_them())


def test_memory_does_not_grow_with_malformed_requests(server: LiveServer) -> None:
    """Measured after the first rounds have made the process what it is."""

    def rounds(count: int) -> int:
        for _ in range(count):
            for wrong in CASES.values():
                refused(channel, wrong)
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])  # type: ignore[index]

    with grpc.insecure_channel(address(server)) as channel:
        settled_kib = rounds(6)
        grown_kib = rounds(20) - settled_kib
    sent_kib = 20 * sum(len(wrong.message) for wrong in CASES.values()) // 1024
    assert grown_kib < sent_kib / 2, "what was sent is not kept"


def test_sigterm_ends_the_server_in_order(trained: Trained, tmp_path: Path, images: np.ndarray) -> None:
    server = start_server(trained.models, tmp_path, {"HBLL_GRPC_PORT": "0"})
    with triton.InferenceServerClient(address(server)) as client:
        client.start_stream(lambda result, error: None)  # open, asking nothing
        client.infer("digits", ask(images))
        assert server.stop() in (0, -15)
    log = server.log.read_text()
    assert "Application shutdown complete" in log
    assert "Traceback" not in log


def serve(trained: Trained, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hbll", "serve", str(trained.models), "--port", "0", *arguments]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HBLL_")}
    environment = inherited | {"COLUMNS": "500"} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def ask_for_ever(health: health_pb2_grpc.HealthStub) -> None:
    """Until it is refused: a signal takes a while to come through."""
    while True:
        health.Check(health_pb2.HealthCheckRequest())


def test_at_sigterm_grpc_takes_no_more_calls_while_http_still_drains(trained: Trained, tmp_path: Path) -> None:
    server = start_server(trained.models, tmp_path, {"HBLL_GRPC_PORT": "0"})
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as connection:
        connection.sendall(
            b"POST /v1/models/digits/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        assert httpx.get(f"{server.url}/health/live").status_code == 200  # so the half request has been read before
        with grpc.insecure_channel(address(server)) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.RpcError) as ended:
                ask_for_ever(health)
            # A call that arrives in the very moment is cancelled by the library.
            assert ended.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert server.process.poll() is None, "HTTP had drained before"
    assert server.process.wait(timeout=30) in (0, -15)


def test_a_port_that_cannot_be_had_stops_start_up(trained: Trained) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        for done, message in (
            (
                serve(trained, "--grpc-port", str(port)),
                f"the gRPC port {port} of 127.0.0.1 cannot be opened: Address already",
            ),
            (serve(trained, HBLL_GRPC_PORT="70000"), "grpc_port (environment HBLL_GRPC_PORT): Input should be less than"),
            (
                serve(trained, "--port", str(port)),
                f"port {port} of 127.0.0.1 cannot be opened, Address already in use: stop",
            ),
            (serve(trained, HBLL_HOST="203.0.113.1"), "of 203.0.113.1 cannot be opened, Cannot assign requested address\n"),
        ):
            assert done.returncode == 1
            assert message in done.stderr
            assert "Traceback" not in done.stderr


def test_a_missing_extra_is_named(trained: Trained, tmp_path: Path) -> None:
    """By a module path on which the library cannot be imported, and without gRPC nobody misses it."""
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text("import sys\nsys.modules['grpc'] = None\n")
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = serve(trained, "--grpc-port", "0", PYTHONPATH=paths)
    assert done.returncode == 1
    assert "pip install 'hbll-anytime[grpc]'" in done.stderr
    assert "Traceback" not in done.stderr
    without = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['grpc'] = None; import service.cli"], capture_output=True, text=True
    )
    assert without.returncode == 0, without.stderr
