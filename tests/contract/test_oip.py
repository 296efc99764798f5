"""The Open Inference Protocol as its specification and its extensions have it, spoken by hand."""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
import zlib

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.policy.wish import Wish, resolve_wish
from service.repository import Repository
from service.settings import Settings
from tests.conftest import Trained
from tests.contract.conftest import Client
from tests.fakes import fake_model
from training.dataset import Dataset

MODEL = "/v2/models/digits"
OUTPUTS = {
    "probabilities": ("FP32", [-1, 10]),
    "logits": ("FP32", [-1, 10]),
    "label": ("BYTES", [-1]),
    "confidence": ("FP32", [-1]),
    "depth": ("INT64", [-1]),
    "path": ("BYTES", [-1]),
    "stopped_by": ("BYTES", [-1]),
}
DTYPES = {"FP32": "<f4", "INT64": "<i8"}


@pytest.fixture(scope="module")
def images(digits: Dataset) -> np.ndarray:
    return digits.test.x[:4].numpy()


def in_json(images: np.ndarray, **members: object) -> dict[str, object]:
    tensor = {"name": "x", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return {"inputs": [tensor], **members}


def post(client: Client, body: object, url: str = f"{MODEL}/infer", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.request("POST", url, content=json.dumps(body).encode(), headers=named)


def post_binary(client: Client, images: np.ndarray, datatype: str = "FP32", **members: object) -> httpx.Response:
    """As tritonclient does: the tensor after the JSON, and no Content-Type."""
    data = images.tobytes()
    tensor = {"name": "x", "shape": images.shape, "datatype": datatype, "parameters": {"binary_data_size": len(data)}}
    header = json.dumps({"inputs": [tensor], **members}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    return client.request("POST", f"{MODEL}/infer", content=header + data, headers=headers)


def tensors(response: httpx.Response) -> dict[str, list[object]]:
    """The outputs of an answer by name, whichever way each came."""
    assert response.status_code == 200, response.text
    length = response.headers.get("inference-header-content-length")
    content = response.content if length is None else response.content[: int(length)]
    rest = b"" if length is None else response.content[int(length) :]
    assert response.headers["content-type"] == ("application/json" if length is None else "application/octet-stream")
    found = {}
    for output in json.loads(content)["outputs"]:
        if "data" in output:
            values = output["data"]
        else:
            size = output["parameters"]["binary_data_size"]
            data, rest = rest[:size], rest[size:]
            values = (
                strings(data) if output["datatype"] == "BYTES" else list(np.frombuffer(data, DTYPES[output["datatype"]]))
            )
        assert len(values) == np.prod(output["shape"])
        assert output["datatype"] == OUTPUTS[output["name"]][0]
        found[output["name"]] = values
    assert rest == b""
    return found


def strings(data: bytes) -> list[str]:
    found = []
    while data:
        (length,) = struct.unpack("<I", data[:4])
        found.append(data[4 : 4 + length].decode())
        data = data[4 + length :]
    return found


def parameters(response: httpx.Response) -> dict[str, object]:
    assert response.status_code == 200, response.text
    return response.json()["parameters"]


# What the server tells


def test_the_server_announces_what_it_serves(client: Client) -> None:
    for url in ("/v2", "/v2/"):
        answer = client.get(url).json()
        assert answer["name"] == "hbll-anytime"
        assert answer["extensions"] == [
            "binary_tensor_data",
            "model_configuration",
            "model_repository",
            "model_repository(unload_dependents)",
            "parameters",
            "statistics",
        ]


def test_health(client: Client) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for url in (f"{MODEL}/ready", f"{MODEL}/versions/1/ready"):
        assert client.get(url).json() == {"name": "digits", "ready": True}


def test_a_model_is_told_as_a_function_of_tensors(client: Client) -> None:
    for url in (MODEL, f"{MODEL}/versions/1"):
        assert client.get(url).json() == {
            "name": "digits",
            "versions": ["1"],
            "platform": "onnx_onnxv1",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 28, 28]}],
            "outputs": [{"name": name, "datatype": kind, "shape": shape} for name, (kind, shape) in OUTPUTS.items()],
        }


def test_the_configuration_leaves_the_axis_of_rows_out(client: Client) -> None:
    for url in (f"{MODEL}/config", f"{MODEL}/versions/1/config"):
        config = client.get(url).json()
        assert config["max_batch_size"] == 40
        assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [28, 28]}]
        outputs = {output.pop("name"): output for output in config["output"]}
        assert list(outputs) == list(OUTPUTS)
        assert outputs["logits"] == {"data_type": "TYPE_FP32", "dims": [10]}
        assert outputs["label"] == {"data_type": "TYPE_STRING", "dims": [1], "reshape": {"shape": []}}


def test_statistics_count_requests_rows_and_failures(client: Client, images: np.ndarray) -> None:
    def read() -> list[int]:
        (stats,) = client.get(f"{MODEL}/stats").json()["model_stats"]
        assert client.get("/v2/models/stats").json()["model_stats"] == [stats]
        assert client.get(f"{MODEL}/versions/1/stats").json()["model_stats"] == [stats]
        times = stats["inference_stats"]
        assert times["success"]["ns"] >= times["queue"]["ns"] > 0
        assert times["compute_input"]["count"] == times["compute_infer"]["count"] == times["compute_output"]["count"]
        counts = [times[name]["count"] for name in ("success", "fail", "queue", "compute_infer")]
        return [stats["inference_count"], stats["execution_count"], *counts]

    post(client, in_json(images))
    before = read()
    post(client, in_json(images, parameters={"depth": 1}))
    post_binary(client, images[:1])
    client.predict({"inputs": [images[0].tolist()]})
    assert post(client, in_json(images, parameters={"timeout": 1, "strict": True})).status_code == 504
    post(client, in_json(images, parameters={"depth": 99}))  # not admitted
    assert [b - a for a, b in zip(before, read(), strict=True)] == [6, 3, 3, 1, 3, 3]
    (stats,) = client.get(f"{MODEL}/stats").json()["model_stats"]
    assert stats["last_inference"] > 1_600_000_000_000


def test_the_repository_lists_what_is_served(client: Client) -> None:
    for body in (b"", b"{}", b'{"ready": true}'):
        answer = client.request("POST", "/v2/repository/index", content=body).json()
        assert answer == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]


def test_a_model_that_is_served_in_its_newest_version_may_be_loaded_and_nothing_happens(client: Client) -> None:
    for body in (b"", b"{}", b'{"parameters": {}}'):
        response = client.request("POST", "/v2/repository/models/digits/load", content=body)
        assert (response.status_code, response.content) == (200, b"")
    assert client.get("/v1/models/digits").json()["version"] == 1


def test_an_unloaded_model_is_not_there_until_it_is_loaded(client: Client, images: np.ndarray) -> None:
    def act(action: str, body: bytes = b"") -> tuple[int, bytes]:
        response = client.request("POST", f"/v2/repository/models/digits/{action}", content=body)
        return response.status_code, response.content

    before = tensors(post(client, in_json(images, parameters={"depth": 2})))
    try:
        for body in (b"", b"{}", b'{"parameters": {"unload_dependents": true}}'):  # again: nothing happens
            assert act("unload", body) == (200, b"")
        sentence = "digits was unloaded: an operator's `load` serves it again"
        for response in (
            post(client, in_json(images)),
            post(client, in_json(images), f"{MODEL}/versions/1/infer"),
            *(client.get(url) for url in (MODEL, f"{MODEL}/ready", f"{MODEL}/versions/1/ready", f"{MODEL}/stats")),
            client.predict({"inputs": [images[0].tolist()]}),
            client.get("/v1/models/digits/versions"),
        ):
            assert response.status_code == 404
            assert response.json() == {"error": sentence, "code": "unknown_model", "models": []}
        unknown = client.get("/v2/models/cats")
        assert unknown.json()["error"] == "no model 'cats' is served here, nor any other"
        index = client.request("POST", "/v2/repository/index")
        assert index.json() == [{"name": "digits", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}]
        assert client.request("POST", "/v2/repository/index", content=b'{"ready": true}').json() == []
        assert client.get("/v1/models").json() == {"models": []}
        assert client.get("/v2/models/stats").json() == {"model_stats": []}
        assert client.get("/v2/health/ready").json() == {"ready": True}
        assert client.get("/health/ready").json() == {"ready": True, "drift_alarms": {}}
    finally:
        assert act("load") == (200, b"")
    index = client.request("POST", "/v2/repository/index")
    assert index.json() == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]
    assert client.get(f"{MODEL}/ready").status_code == 200
    assert tensors(post(client, in_json(images, parameters={"depth": 2}))) == before


def test_what_the_repository_cannot_do_it_says(client: Client) -> None:
    for action, body, status, code in (
        ("cats/unload", b"", 404, "unknown_model"),
        ("digits/unload", b'{"parameters": {"force": true}}', 400, "bad_request"),
        ("digits/unload", b'{"parameters": {"unload_dependents": "yes"}}', 400, "bad_request"),
        ("digits/unload", b"{", 400, "bad_request"),
        ("cats/load", b"", 404, "unknown_model"),
        ("..%2fdigits/load", b"", 404, "not_found"),
        ("digits/load", b'{"parameters": {"config": "{}"}}', 400, "bad_request"),
        ("digits/load", b"{", 400, "bad_request"),
    ):
        response = client.request("POST", f"/v2/repository/models/{action}", content=body)
        assert (response.status_code, response.json()["code"]) == (status, code), action


def test_a_server_that_warms_up_is_live_not_ready_and_says_when_to_ask_again() -> None:
    async def ask() -> list[httpx.Response]:
        app = create_app(Settings(), Repository([fake_model()]))  # whose life has not begun
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            tensor = {"name": "x", "shape": [1, 2, 2], "datatype": "FP32", "data": [0, 0, 0, 0]}
            return [
                await http.get("/v2/health/live"),
                await http.post("/v2/repository/index", json={"ready": False}),
                await http.post("/v2/repository/index", json={"ready": True}),
                await http.get("/v2/health/ready"),
                await http.get("/v2/models/fake/ready"),
                await http.post("/v2/models/fake/infer", json={"inputs": [tensor]}),
            ]

    live, everything, ready, *refused = asyncio.run(ask())
    assert live.json() == {"live": True}
    assert [entry["state"] for entry in everything.json()] == ["LOADING"]
    assert ready.json() == []
    for response in refused:
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["code"] == "not_ready"
    assert refused[0].json()["ready"] is False
    assert refused[1].json()["name"] == "fake"


# Tensors in and out


def test_answers_are_those_of_the_native_protocol(client: Client, trained: Trained, images: np.ndarray) -> None:
    body = {"inputs": [image.tolist() for image in images], "probabilities": True, "path": "4-6"}
    native = client.predict(body).json()["predictions"]
    for response in (
        post(client, in_json(images, parameters={"path": "4-6"})),
        post_binary(client, images, parameters={"path": "4-6", "binary_data_output": True}),
    ):
        got = tensors(response)
        assert list(got) == list(OUTPUTS)
        for name in ("label", "depth", "path", "stopped_by"):
            assert got[name] == [row[name] for row in native]
        assert got["confidence"] == pytest.approx([row["confidence"] for row in native], abs=1e-6)
        expected = np.array([list(row["probabilities"].values()) for row in native])
        probabilities = np.array(got["probabilities"]).reshape(4, 10)
        np.testing.assert_allclose(probabilities, expected, atol=1e-6)
        temperature = trained.manifest.offered[(4, 6)].temperature
        scaled = np.exp(np.array(got["logits"], np.float64).reshape(4, 10) / temperature)
        np.testing.assert_allclose(scaled / scaled.sum(axis=1, keepdims=True), expected, atol=1e-5)


def test_data_may_be_nested(client: Client, images: np.ndarray) -> None:
    body = in_json(images)
    flat = tensors(post(client, body))
    body["inputs"][0]["data"] = images.tolist()
    assert tensors(post(client, body)) == flat


@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [
        ("FP16", "<f2"),
        ("FP64", "<f8"),
        ("INT8", "i1"),
        ("INT32", "<i4"),
        ("INT64", "<i8"),
        ("UINT8", "u1"),
        ("UINT64", "<u8"),
    ],
)
def test_other_numbers_are_converted(client: Client, images: np.ndarray, datatype: str, dtype: str) -> None:
    ink = images.round()  # 0 and 1, which every datatype has
    expected = tensors(post_binary(client, ink))
    assert tensors(post_binary(client, ink.astype(dtype), datatype)) == expected
    body = in_json(ink)
    body["inputs"][0] |= {"datatype": datatype, "data": ink.ravel().astype(int).tolist()}
    assert tensors(post(client, body)) == expected


@pytest.mark.parametrize("padding", range(8))
def test_binary_tensors_may_lie_at_any_address(client: Client, images: np.ndarray, padding: int) -> None:
    """After a JSON of any length a float may straddle what the machine likes."""
    expected = tensors(post_binary(client, images))
    assert tensors(post_binary(client, images, id="x" * padding)) == expected


def test_a_body_of_nothing_but_one_row_is_answered_in_binary(client: Client, images: np.ndarray) -> None:
    headers = {"Inference-Header-Content-Length": "0", "X-Depth": "2"}
    response = client.request("POST", f"{MODEL}/infer", content=images[0].tobytes(), headers=headers)
    got = tensors(response)
    assert b'"data"' not in response.content
    assert (got["depth"], got["stopped_by"]) == ([2], ["depth"])
    assert got["label"] == tensors(post(client, in_json(images[:1], parameters={"depth": 2})))["label"]


def test_only_the_outputs_that_are_named_come_in_that_order(client: Client, images: np.ndarray) -> None:
    response = post(client, in_json(images, outputs=[{"name": "depth"}, {"name": "label"}]))
    assert [output["name"] for output in response.json()["outputs"]] == ["depth", "label"]
    assert "parameters" not in response.json()["outputs"][0]


def test_an_output_decides_for_itself_whether_it_is_binary(client: Client, images: np.ndarray) -> None:
    outputs = [{"name": "label", "parameters": {"binary_data": False}}, {"name": "depth"}]
    response = post_binary(client, images, outputs=outputs, parameters={"binary_data_output": True})
    length = int(response.headers["inference-header-content-length"])
    label, depth = json.loads(response.content[:length])["outputs"]
    assert len(label["data"]) == 4
    assert depth["parameters"] == {"binary_data_size": 32}
    outputs = [{"name": "label", "parameters": {"binary_data": True}}, {"name": "depth"}]
    assert tensors(post(client, in_json(images, outputs=outputs)))["label"] == label["data"]


def test_an_id_comes_back(client: Client, images: np.ndarray) -> None:
    answer = post(client, in_json(images, id="\u00e9 42", model_name="whatever")).json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("\u00e9 42", "digits", "1")
    assert "id" not in post(client, in_json(images)).json()


def test_a_version_in_the_url_is_obeyed(client: Client, images: np.ndarray) -> None:
    assert post(client, in_json(images), f"{MODEL}/versions/1/infer").json()["model_version"] == "1"
    for version in ("2", "0", "01", "latest", "9" * 5000):
        for method, suffix in (("POST", "/infer"), ("GET", ""), ("GET", "/ready"), ("GET", "/config"), ("GET", "/stats")):
            response = client.request(method, f"{MODEL}/versions/{version}{suffix}")
            assert (response.status_code, response.json()["code"]) == (404, "unknown_version")
    assert response.json()["versions"] == ["1"]


def test_other_content_types_are_415(client: Client, images: np.ndarray) -> None:
    response = post(client, in_json(images), content_type="text/plain")
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
    assert post(client, in_json(images), content_type="application/json; charset=utf-8").status_code == 200


# Compression


@pytest.mark.parametrize(("coding", "packed"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_may_be_compressed_both_ways(client: Client, images: np.ndarray, coding: str, packed) -> None:
    expected = tensors(post_binary(client, images))
    data = images.tobytes()
    tensor = {"name": "x", "shape": images.shape, "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header)), "Content-Encoding": coding, "Accept-Encoding": coding}
    response = client.request("POST", f"{MODEL}/infer", content=packed(header + data), headers=headers)
    assert response.headers["content-encoding"] == coding
    assert int(response.headers["content-length"]) < len(response.content)  # which httpx has decompressed
    assert int(response.headers["inference-header-content-length"]) > 0  # of the JSON before compression
    got = tensors(response)
    for name in ("label", "depth", "probabilities"):
        assert (
            got[name] == pytest.approx(expected[name], abs=1e-6) if name == "probabilities" else got[name] == expected[name]
        )


def test_answers_and_errors_are_plain_for_who_does_not_ask(client: Client, images: np.ndarray) -> None:
    response = post(client, in_json(images), accept_encoding="identity")
    assert "content-encoding" not in response.headers
    response = post(client, {}, accept_encoding="gzip")  # clients do not expect a compressed error
    assert "content-encoding" not in response.headers
    assert response.status_code == 400


# Wishes


@pytest.mark.parametrize("where", ["parameters", "headers"])
def test_every_wish_is_taken_from_parameters_and_from_headers(client: Client, images: np.ndarray, where: str) -> None:
    def ask(**wishes: object) -> httpx.Response:
        if where == "parameters":
            return post(client, in_json(images, parameters=wishes))
        return post(client, in_json(images), **{f"x_{name}": str(value) for name, value in wishes.items()})

    assert tensors(ask(depth=3))["depth"] == [3] * 4
    assert tensors(ask(depth="full"))["path"] == ["1-2-3-4-5-6-7"] * 4
    assert tensors(ask(path="4-6"))["path"] == ["4-6"] * 4
    assert tensors(ask(min_confidence=0))["stopped_by"] == ["confidence"] * 4
    assert parameters(ask(latency_budget_ms=10_000))["deadline_met"] is True
    response = ask(latency_budget_ms=0.01, strict=True)
    assert (response.status_code, response.json()["code"]) == (504, "deadline_infeasible")
    assert response.json()["smallest_feasible_budget_ms"] > 0.01
    assert ask(max_risk=0.123).json()["code"] == "not_offered"


def test_the_body_wins_over_headers(client: Client, images: np.ndarray) -> None:
    response = post(client, in_json(images, parameters={"depth": 2}), x_depth="3", x_latency_budget_ms="10000")
    assert parameters(response)["depth"] == 2
    assert parameters(response)["deadline_met"] is True
    assert tensors(post(client, in_json(images, parameters={"depth": 2}), x_min_confidence="0.9"))["depth"] == [2] * 4


def test_what_concerns_the_whole_request_is_among_the_parameters(
    client: Client, trained: Trained, images: np.ndarray
) -> None:
    answer = parameters(post(client, in_json(images)))
    assert set(answer) == {"depth", "queue_ms", "compute_ms", "total_ms"}
    assert answer["queue_ms"] + answer["compute_ms"] <= answer["total_ms"]
    assert answer["depth"] == len(trained.manifest.reference)
    level = trained.manifest.certificate.levels[-1].epsilon
    response = post(client, in_json(images, parameters={"max_risk": level}))
    assert parameters(response)["certified"] is True
    assert parameters(response)["depth"] == max(tensors(response)["depth"])
    assert set(tensors(response)["stopped_by"]) <= {"risk", "complete"}


def test_of_timeout_and_budget_the_smaller_counts(client: Client, images: np.ndarray) -> None:
    """A timeout is in microseconds, and 0 is none."""
    tight = {"latency_budget_ms": 60_000, "timeout": 10, "strict": True}
    assert "a budget of 0.01 ms cannot be met" in post(client, in_json(images, parameters=tight)).json()["error"]
    tight = {"latency_budget_ms": 0.02, "timeout": 60_000_000, "strict": True}
    assert "a budget of 0.02 ms cannot be met" in post(client, in_json(images, parameters=tight)).json()["error"]
    assert parameters(post(client, in_json(images, parameters={"timeout": 60_000_000})))["deadline_met"] is True
    assert "deadline_met" not in parameters(post(client, in_json(images, parameters={"timeout": 0})))
    response = post(client, in_json(images, parameters={"timeout": 10, "strict": True}), x_latency_budget_ms="60000")
    assert response.status_code == 504


@pytest.mark.parametrize("priority", [0, 1, 2**63 - 1])
def test_a_priority_reaches_the_engine(
    client: Client, images: np.ndarray, priority: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes: list[Wish] = []

    def noted(*arguments: object, **options: object) -> Wish:
        wishes.append(resolve_wish(*arguments, **options))
        return wishes[-1]

    monkeypatch.setattr("service.call.resolve_wish", noted)
    assert post(client, in_json(images, parameters={"priority": priority, "depth": 2})).status_code == 200
    assert [(wish.priority, wish.asked_as) for wish in wishes] == [(priority, "depth")]


# What other clients send, as it was on the wire


@pytest.mark.parametrize("binary", [True, False])
def test_kserve_requests_are_answered(client: Client, images: np.ndarray, binary: bool) -> None:
    """The bodies and headers of KServe 0.21's InferenceRESTClient, which names the model in the body, too."""
    data = images[:1].tobytes()
    tensor = {"name": "x", "shape": [1, 28, 28], "datatype": "FP32"}
    tensor |= {"parameters": {"binary_data_size": 3136}} if binary else {"data": images[0].ravel().tolist()}
    body = {
        "id": "7",
        "model_name": "digits",
        "inputs": [tensor],
        "outputs": [{"name": "label"}],
        "parameters": {"depth": 2},
    }
    header = json.dumps(body, separators=(",", ":")).encode()
    headers = {"accept-encoding": "gzip, deflate", "content-type": "application/json"}
    if binary:
        headers |= {"content-type": "application/octet-stream", "inference-header-content-length": str(len(header))}
    content = header + data if binary else header
    response = client.request("POST", f"{MODEL}/infer", content=content, headers=headers)
    assert response.json()["id"] == "7"
    assert tensors(response) == {"label": tensors(post_binary(client, images[:1], parameters={"depth": 2}))["label"]}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin", "origin": "http://of-a-proxy"}, 404),
        ({"sec-fetch-site": "none"}, 404),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "http://test"}, 404),
        ({}, 404),
    ],
)
def test_no_page_of_another_site_changes_what_is_served(client: Client, headers: dict[str, str], status: int) -> None:
    """A browser sends a POST without a body across origins without asking."""
    response = client.request("POST", "/v2/repository/models/cats/unload", headers={"host": "test"} | headers)
    assert response.status_code == status
