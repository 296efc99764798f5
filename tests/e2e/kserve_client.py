"""KServe's own clients, unmodified, against a real server: `make kserve`.

No test of pytest, for KServe's pins exclude ours: this runs in an environment of KServe's, which has nothing of ours, and
starts the server with the Python of the main one.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from importlib.metadata import version

import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, InferResponse, RESTConfig

READY_S = 120
ROWS = 4
WISHES: tuple[dict[str, object], ...] = ({}, {"depth": 2}, {"depth": "best"}, {"min_confidence": 0.5})


def main(python: str, models: str) -> None:
    port, grpc_port = free_ports()
    url = f"http://127.0.0.1:{port}"
    command = [python, "-m", "hbll", "serve", models, "--port", str(port), "--grpc-port", str(grpc_port)]
    with subprocess.Popen(command) as server:
        try:
            wait_until_ready(url, server)
            asked = asyncio.run(ask_all(url, f"127.0.0.1:{grpc_port}"))
        finally:
            server.terminate()
    sys.stdout.write(f"kserve {version('kserve')}: {asked} answers, each what /v1 answers\n")


async def ask_all(url: str, rpc: str) -> int:
    """Every model by every protocol and with every wish; returns how many answers were compared."""
    asked = 0
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    async with InferenceGRPCClient(rpc) as grpc, httpx.AsyncClient(base_url=url, timeout=30) as native:
        assert await rest.is_server_live(url)
        assert await rest.is_server_ready(url)
        assert await grpc.is_server_live()
        assert await grpc.is_server_ready()
        for name in [model["name"] for model in (await native.get("/v1/models")).json()["models"]]:
            assert await rest.is_model_ready(url, name)
            assert await grpc.is_model_ready(name)
            (tensor,) = (await native.get(f"/v2/models/{name}")).json()["inputs"]
            x = np.random.default_rng(0).random((ROWS, *tensor["shape"][1:]), np.float32)
            for wishes in WISHES:
                body = {"inputs": x.tolist(), "probabilities": True, **wishes}
                expected = (await native.post(f"/v1/models/{name}/predict", json=body)).raise_for_status().json()
                for binary in (True, False):
                    answer = await rest.infer(url, request(name, tensor["name"], x, wishes, binary), model_name=name)
                    check(answer, expected["predictions"])
                # As metadata: by gRPC this client sends no parameter that is a fraction.
                metadata = [(f"x-{wish.replace('_', '-')}", str(value)) for wish, value in wishes.items()]
                answer = await grpc.infer(request(name, tensor["name"], x, {}, binary=True), headers=metadata)
                check(answer, expected["predictions"])
                asked += 3
        await refused(rest, url, name, tensor["name"], x)
    assert asked > 0, "the server has no model"
    return asked


def request(model: str, tensor: str, x: np.ndarray, wishes: dict[str, object], binary: bool) -> InferRequest:
    given = InferInput(tensor, list(x.shape), "FP32")
    given.set_data_from_numpy(x, binary_data=binary)
    return InferRequest(model, [given], request_id="42", parameters=dict(wishes))


def check(answer: InferResponse, expected: list[dict[str, object]]) -> None:
    assert answer.id == "42"
    outputs = {output.name: output for output in answer.outputs}
    assert outputs["depth"].as_numpy().tolist() == [row["depth"] for row in expected]
    for name in ("label", "path", "stopped_by"):
        texts = [text.decode() if isinstance(text, bytes) else text for text in outputs[name].as_numpy()]
        assert texts == [row[name] for row in expected], (name, texts)
    probabilities = np.array([list(row["probabilities"].values()) for row in expected])
    np.testing.assert_allclose(outputs["probabilities"].as_numpy().reshape(probabilities.shape), probabilities, atol=1e-5)


async def refused(rest: InferenceRESTClient, url: str, model: str, tensor: str, x: np.ndarray) -> None:
    """Errors are told in the server's words."""
    assert not await rest.is_model_ready(url, "cats")
    try:
        await rest.infer(url, request(model, tensor, x, {"depth": 99}, binary=True), model_name=model)
    except httpx.HTTPStatusError as error:
        assert "depth 99 is not offered" in str(error)  # noqa: PT017 (there is no pytest in that environment)
    else:
        raise AssertionError("depth 99 was answered")


def free_ports() -> tuple[int, int]:
    """Two that nobody listens at just now."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"{url}/health/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)  # polls another process
    raise SystemExit("the server did not become ready; its log says why")


if __name__ == "__main__":
    main(*sys.argv[1:])
