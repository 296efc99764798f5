"""The Open Inference Protocol as clients speak it that others wrote: tritonclient, unmodified, against a real server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.conftest import LiveServer
from training.dataset import Dataset

CODINGS = [None, "gzip", "deflate"]


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
    client = triton.InferenceServerClient(server.url.removeprefix("http://"), concurrency=4)
    yield client
    client.close()


def tensor(images: np.ndarray, binary: bool = True) -> triton.InferInput:
    found = triton.InferInput("x", list(images.shape), "FP32")
    return found.set_data_from_numpy(images, binary_data=binary)


def texts(result: triton.InferResult, name: str) -> list[str]:
    """A tensor of strings, which tritonclient gives as bytes if it came as bytes."""
    return [text.decode() if isinstance(text, bytes) else text for text in result.as_numpy(name)]


def check(result: triton.InferResult, expected: list[dict[str, object]]) -> None:
    """All outputs of an answer at depth 2."""
    assert texts(result, "label") == [row["label"] for row in expected]
    assert texts(result, "path") == [row["path"] for row in expected]
    assert texts(result, "stopped_by") == ["depth"] * len(expected)
    assert result.as_numpy("depth").dtype == np.int64
    assert result.as_numpy("depth").tolist() == [2] * len(expected)
    np.testing.assert_allclose(result.as_numpy("confidence"), [row["confidence"] for row in expected], atol=1e-5)
    probabilities = [list(row["probabilities"].values()) for row in expected]
    np.testing.assert_allclose(result.as_numpy("probabilities"), probabilities, atol=1e-5)
    assert (result.as_numpy("logits").argmax(axis=1) == np.argmax(probabilities, axis=1)).all()
    assert result.as_numpy("logits").dtype == np.float32


def test_the_server_is_found_and_told(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert not client.is_model_ready("digits", "2")
    assert not client.is_model_ready("cats")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("digits", "1")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 28, 28]}]
    assert client.get_model_config("digits")["max_batch_size"] == 256
    assert client.get_model_repository_index() == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]
    client.load_model("digits")


def test_a_model_is_unloaded_and_loaded(
    client: triton.InferenceServerClient, images: np.ndarray, expected: list[dict[str, object]]
) -> None:
    """As Triton's example `simple_http_model_control.py` does it."""
    try:
        client.unload_model("digits", unload_dependents=True)
        assert not client.is_model_ready("digits")
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="digits was unloaded") as caught:
            client.infer("digits", [tensor(images)])
        assert caught.value.status() == "404"
        unloaded = {"name": "digits", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
        assert client.get_model_repository_index() == [unloaded]
    finally:
        client.load_model("digits")
    assert client.is_model_ready("digits")
    check(client.infer("digits", [tensor(images)], parameters={"depth": 2}), expected)


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize(("request_coding", "response_coding"), list(itertools.product(CODINGS, CODINGS)))
def test_every_way_to_send_and_to_receive_gives_one_answer(
    client: triton.InferenceServerClient,
    images: np.ndarray,
    expected: list[dict[str, object]],
    binary_in: bool,
    binary_out: bool,
    request_coding: str | None,
    response_coding: str | None,
) -> None:
    names = [output["name"] for output in client.get_model_metadata("digits")["outputs"]]
    result = client.infer(
        "digits",
        [tensor(images, binary_in)],
        outputs=[triton.InferRequestedOutput(name, binary_data=binary_out) for name in names],
        request_id="42",
        parameters={"depth": 2},
        request_compression_algorithm=request_coding,
        response_compression_algorithm=response_coding,
    )
    check(result, expected)
    assert result.get_response()["id"] == "42"
    assert result.get_response()["parameters"]["depth"] == 2


def test_the_clients_default_is_all_outputs_in_binary(
    client: triton.InferenceServerClient, images: np.ndarray, expected: list[dict[str, object]]
) -> None:
    result = client.infer("digits", [tensor(images)], model_version="1", parameters={"depth": 2})
    check(result, expected)
    assert all("data" not in output for output in result.get_response()["outputs"])


def test_calls_in_parallel_each_get_their_own_answer(
    client: triton.InferenceServerClient, images: np.ndarray, expected: list[dict[str, object]]
) -> None:
    calls = [client.async_infer("digits", [tensor(images[[n % 6]])], parameters={"depth": 2}) for n in range(60)]
    for number, call in enumerate(calls):
        check(call.get_result(), [expected[number % 6]])


def test_outputs_are_selected(client: triton.InferenceServerClient, images: np.ndarray) -> None:
    wanted = [triton.InferRequestedOutput("depth"), triton.InferRequestedOutput("label", binary_data=False)]
    result = client.infer("digits", [tensor(images)], outputs=wanted)
    assert [output["name"] for output in result.get_response()["outputs"]] == ["depth", "label"]
    assert result.as_numpy("probabilities") is None
    wanted = [triton.InferRequestedOutput("probabilities", class_count=3)]
    with pytest.raises(InferenceServerException, match="classification is not served"):
        client.infer("digits", [tensor(images)], outputs=wanted)


def test_wishes_are_custom_parameters_or_headers(client: triton.InferenceServerClient, images: np.ndarray) -> None:
    result = client.infer("digits", [tensor(images)], parameters={"min_confidence": 0.0, "latency_budget_ms": 30_000.0})
    assert texts(result, "stopped_by") == ["confidence"] * 6
    assert result.get_response()["parameters"]["deadline_met"] is True
    result = client.infer("digits", [tensor(images)], headers={"X-Depth": "3"})
    assert result.as_numpy("depth").tolist() == [3] * 6


def test_timeout_is_a_budget_in_microseconds_and_priority_is_taken(
    client: triton.InferenceServerClient, images: np.ndarray
) -> None:
    result = client.infer("digits", [tensor(images)], timeout=30_000_000, priority=1)
    assert result.get_response()["parameters"]["deadline_met"] is True
    with pytest.raises(InferenceServerException, match=r"a budget of 0\.02 ms cannot be met now") as caught:
        client.infer("digits", [tensor(images)], timeout=20, parameters={"strict": True})
    assert caught.value.status() == "504"


def test_errors_are_what_the_client_understands(client: triton.InferenceServerClient, images: np.ndarray) -> None:
    with pytest.raises(InferenceServerException, match="no model 'cats' is served here") as caught:
        client.infer("cats", [tensor(images)])
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match=r"expected shape \[-1, 28, 28\], got \[6, 28, 27\]") as caught:
        client.infer("digits", [tensor(images[:, :, 1:].copy())], response_compression_algorithm="gzip")
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="depth 9 is not offered") as caught:
        client.infer("digits", [tensor(images)], parameters={"depth": 9})
    assert caught.value.status() == "422"
    with pytest.raises(InferenceServerException, match="got 'sequence_id'"):
        client.infer("digits", [tensor(images)], sequence_id=7, sequence_start=True)


def test_statistics_grow_with_the_work(client: triton.InferenceServerClient, images: np.ndarray) -> None:
    def read() -> tuple[int, int]:
        (stats,) = client.get_inference_statistics("digits")["model_stats"]
        return stats["inference_count"], stats["inference_stats"]["success"]["count"]

    rows, requests = read()
    client.infer("digits", [tensor(images)])
    assert read() == (rows + 6, requests + 1)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("binary", [True, False])
def test_the_asyncio_client_gets_the_same(
    server: LiveServer, images: np.ndarray, expected: list[dict[str, object]], coding: str | None, binary: bool
) -> None:
    async def ask() -> list[triton.InferResult]:
        async with triton_aio.InferenceServerClient(server.url.removeprefix("http://")) as client:
            assert await client.is_model_ready("digits")
            options = {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
            calls = (
                client.infer("digits", [tensor(images, binary)], parameters={"depth": 2}, **options) for _ in range(10)
            )
            return await asyncio.gather(*calls)

    for result in asyncio.run(ask()):
        check(result, expected)
