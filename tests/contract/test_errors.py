"""Bad input: always a 4xx of the one shape, with a message that says what was expected; and the server serves on."""

from __future__ import annotations

import base64
import codecs
import gzip
import io
import json
import struct
import zlib

import pytest
from PIL import Image
from pydantic import ValidationError

from service.oip.schemas import UnloadRequest
from service.schemas import PredictRequest
from tests.contract.conftest import Client, left_to_the_collector

GOOD = [[0.5] * 28] * 28


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _png(width: int, height: int) -> bytes:
    """A PNG that announces any size and holds next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def _truncated_png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((200, 200), 80).save(file, "PNG")
    return file.getvalue()[: len(file.getvalue()) // 2]


def _large_png() -> bytes:
    file = io.BytesIO()
    Image.new("1", (3000, 3000)).save(file, "PNG")
    return file.getvalue()


def _tensor(**changes: object) -> dict[str, object]:
    return {"tensor": _b64(b"\0" * 4 * 784), "datatype": "FP32", "shape": [28, 28]} | changes


def _with(value: object) -> list[list[object]]:
    return [[value, *([0.5] * 27)], *([[0.5] * 28] * 27)]


UNPARSABLE = {
    "no json": (b"{", "the body is no JSON"),
    "empty body": (b"", "the body is no JSON"),
    "half a surrogate": (b'{"inputs": ["\\ud800"]}', "the body is no JSON"),
    "not utf-8": (b'{"inputs": ["\xff"]}', ""),
    "deep nesting": (b"[" * 100_000, ""),
    "text as base64": (json.dumps({"inputs": [{"image": "***"}]}).encode(), "expected base64"),
    "not an image": (
        json.dumps({"inputs": [{"image": _b64(b"hello world")}]}).encode(),
        "expected a PNG, JPEG, WebP, BMP or GIF",
    ),
    "empty image": (json.dumps({"inputs": [{"image": ""}]}).encode(), "expected a PNG"),
    "truncated image": (json.dumps({"inputs": [{"image": _b64(_truncated_png())}]}).encode(), "the image is damaged"),
    "unpadded tensor": (json.dumps({"inputs": [_tensor(tensor="AAA")]}).encode(), "expected base64"),
}

INVALID = {
    "no inputs": ({}, "inputs: Field required"),
    "empty inputs": ({"inputs": []}, "at least 1 item"),
    "inputs no list": ({"inputs": "x"}, "inputs: Input should be a valid array"),
    "wrong shape": ({"inputs": [[[0.5] * 27] * 28]}, "expected numbers of shape [28, 28], got shape [28, 27]"),
    "flat": ({"inputs": [[0.5] * 784]}, "got shape [784, ...]"),
    "ragged": ({"inputs": [[[0.5] * 28] * 27 + [[0.5]]]}, "uneven lengths"),
    "a number": ({"inputs": [3]}, "expected a nested list of shape [28, 28]"),
    "null": ({"inputs": [None]}, "got NoneType"),
    "strings": ({"inputs": [_with("0.5")]}, "expected numbers"),
    "nulls": ({"inputs": [_with(None)]}, "expected numbers"),
    "huge integers": ({"inputs": [_with(10**400)]}, "expected"),
    "too large for float32": ({"inputs": [_with(1e300)]}, "finite"),
    "bytes of pixels": (
        {"inputs": [_with(255)]},
        "expected pixels between 0 (black) and 1 (white), got values from 0.5 to 255",
    ),
    "negative": ({"inputs": [_with(-0.1)]}, "expected pixels between 0"),
    "unknown object": ({"inputs": [{"picture": "x"}]}, "got an object with ['picture']"),
    "image no string": ({"inputs": [{"image": 3}]}, "expected a base64 string, got int"),
    "tensor short": (
        {"inputs": [_tensor(tensor=_b64(b"\0" * 8))]},
        "expected 3136 bytes for FP32 of shape [28, 28], got 8",
    ),
    "tensor shape": ({"inputs": [_tensor(shape=[784])]}, "shape: expected [28, 28], got '[784]'"),
    "tensor datatype": ({"inputs": [_tensor(datatype="FP64")]}, "datatype: expected FP32, got 'FP64'"),
    "tensor NaN": ({"inputs": [_tensor(tensor=_b64(struct.pack("<f", float("nan")) * 784))]}, "got NaN or infinity"),
    "huge together": (
        {"inputs": [{"image": _b64(_large_png())}] * 2},
        "inputs[1].image: expected at most 16000000 pixels in all images",
    ),
    "depth true": ({"inputs": [GOOD], "depth": True}, "depth"),
    "depth text": ({"inputs": [GOOD], "depth": "3"}, "depth"),
    "budget text": ({"inputs": [GOOD], "latency_budget_ms": "5"}, "latency_budget_ms: Input should be a valid number"),
    "budget true": ({"inputs": [GOOD], "latency_budget_ms": True}, "latency_budget_ms: Input should be a valid number"),
    "probabilities text": ({"inputs": [GOOD], "probabilities": "yes"}, "probabilities: Input should be a valid boolean"),
    "depth huge": ({"inputs": [GOOD], "depth": 10**4000}, "depth"),
    "member huge": ({"inputs": [GOOD], "x" * 100_000: 1}, "Extra inputs are not permitted"),
    "huge image": (
        {"inputs": [{"image": _b64(_png(5000, 5000))}]},
        "in all images of a request (max_image_pixels), got 5000 x 5000 here",
    ),
    "image bomb": ({"inputs": [{"image": _b64(_png(60_000, 60_000))}]}, "expected at most 16000000 pixels"),
    "too many rows": ({"inputs": [_tensor()] * 41}, "expected at most 40 rows (max_request_rows), got 41"),
    "depth 0": ({"inputs": [GOOD], "depth": 0}, "depth: Input should be greater than or equal to 1, got 0"),
    "depth 8": (
        {"inputs": [GOOD], "depth": 8},
        "depth 8 is not offered: expected one of 1, 2, 3, 4, 5, 6, 7, best or full",
    ),
    "depth word": ({"inputs": [GOOD], "depth": "deep"}, "depth"),
    "depth 1.5": ({"inputs": [GOOD], "depth": 1.5}, "depth"),
    "path no hop": ({"inputs": [GOOD], "path": "4-7"}, "4 -> 7 is no hop; from 4 one can go to 5, 6, 8"),
    "path no path": ({"inputs": [GOOD], "path": "best"}, "a path is node numbers joined by '-'"),
    "path empty": ({"inputs": [GOOD], "path": ""}, "a path is node numbers"),
    "path long": ({"inputs": [GOOD], "path": "1-" * 50_000}, "a path is node numbers"),
    "budget negative": (
        {"inputs": [GOOD], "latency_budget_ms": -1},
        "latency_budget_ms: Input should be greater than 0, got -1",
    ),
    "budget zero": ({"inputs": [GOOD], "latency_budget_ms": 0}, "latency_budget_ms"),
    "budget word": ({"inputs": [GOOD], "latency_budget_ms": "soon"}, "latency_budget_ms: Input should be a valid number"),
    "confidence 1.1": (
        {"inputs": [GOOD], "min_confidence": 1.1},
        "min_confidence: Input should be less than or equal to 1",
    ),
    "confidence negative": ({"inputs": [GOOD], "min_confidence": -0.1}, "min_confidence"),
    "depth and path": (
        {"inputs": [GOOD], "depth": 1, "path": "4"},
        "give only one of depth, path, min_confidence and max_risk, got depth and path",
    ),
    "depth and confidence": (
        {"inputs": [GOOD], "depth": 1, "min_confidence": 0.5},
        "give only one of depth, path, min_confidence and max_risk",
    ),
    "path and confidence": (
        {"inputs": [GOOD], "path": "4", "min_confidence": 0.5},
        "give only one of depth, path, min_confidence and max_risk",
    ),
    "risk and confidence": ({"inputs": [GOOD], "max_risk": 0.1, "min_confidence": 0.5}, "got min_confidence and max_risk"),
    "risk not certified": ({"inputs": [GOOD], "max_risk": 0.123}, "max_risk 0.123 is not certified"),
    "risk 0": ({"inputs": [GOOD], "max_risk": 0}, "max_risk: Input should be greater than 0"),
    "unknown member": ({"inputs": [GOOD], "budget": 5}, "budget: Extra inputs are not permitted"),
    "a list": ([GOOD], "the body: Input should be an object"),
    "a string": ("x", "the body: Input should be an object"),
}


def check(client: Client, response: object, status: int, message: str) -> None:
    assert response.status_code == status, response.text
    content = response.json()
    assert set(content) >= {"error", "code"}
    assert isinstance(content["code"], str)
    assert message in content["error"]
    assert len(content["error"]) < 600
    assert client.predict({"inputs": [GOOD]}).status_code == 200


@pytest.mark.parametrize("name", UNPARSABLE)
def test_what_cannot_be_parsed_is_400(client: Client, name: str) -> None:
    body, message = UNPARSABLE[name]
    headers = {"content-type": "application/json"}
    response = client.request("POST", "/v1/models/digits/predict", content=body, headers=headers)
    check(client, response, 400, message)


@pytest.mark.parametrize("name", INVALID)
def test_what_is_well_formed_and_not_valid_is_422(client: Client, name: str) -> None:
    body, message = INVALID[name]
    check(client, client.predict(body), 422, message)


def test_what_was_refused_is_let_go(client: Client) -> None:
    with left_to_the_collector() as left:
        for body, _ in UNPARSABLE.values():
            headers = {"content-type": "application/json"}
            client.request("POST", "/v1/models/digits/predict", content=body, headers=headers)
        for content, _ in INVALID.values():
            client.predict(content)
    assert not left


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("where", ["pixel", "latency_budget_ms", "min_confidence"])
def test_nan_and_infinity_are_refused_everywhere(client: Client, literal: str, where: str) -> None:
    """Python's JSON reader takes these words, so somebody will send them."""
    body = json.dumps({"inputs": [_with("?") if where == "pixel" else GOOD]} | ({} if where == "pixel" else {where: "?"}))
    content = body.replace('"?"', literal).encode()
    headers = {"content-type": "application/json"}
    check(client, client.request("POST", "/v1/models/digits/predict", content=content, headers=headers), 422, "")


def test_what_is_not_offered_lists_what_is(client: Client) -> None:
    assert client.predict({"inputs": [GOOD], "depth": 8}).json()["offered"] == [1, 2, 3, 4, 5, 6, 7]


def test_an_unknown_model_is_404_and_names_the_known(client: Client) -> None:
    for response in (client.predict({"inputs": [GOOD]}, model="cats"), client.get("/v1/models/cats")):
        check(client, response, 404, "no model 'cats' is served here: expected one of digits")
        assert response.json()["code"] == "unknown_model"
    check(client, client.get("/v1/models/..%2f..%2fetc%2fpasswd"), 404, "")


def test_unknown_routes_and_methods_have_the_shape_too(client: Client) -> None:
    check(client, client.get("/v1/nothing"), 404, "there is nothing at /v1/nothing")
    check(client, client.get("/v1/models/"), 404, "there is nothing at /v1/models/")
    check(client, client.get("/v1/models/digits/predict"), 405, "GET is not possible")


def test_a_body_over_the_limit_is_413_whether_or_not_it_says_so(client: Client) -> None:
    async def chunks() -> object:
        for _ in range(50):
            yield b" " * 10_000

    for content in (b" " * 400_001, chunks()):
        headers = {"content-type": "application/json"}
        response = client.request("POST", "/v1/models/digits/predict", content=content, headers=headers)
        check(client, response, 413, "expected a body of at most 400000 bytes")
        assert response.json()["code"] == "body_too_large"


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip"])
def test_an_encoding_that_is_not_read_is_415(client: Client, coding: str) -> None:
    headers = {"content-encoding": coding, "content-type": "application/json"}
    response = client.request("POST", "/v1/models/digits/predict", content=b"x", headers=headers)
    check(client, response, 415, f"expected Content-Encoding gzip, deflate or identity, got {coding!r}")


def test_a_compressed_body_is_read(client: Client) -> None:
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    content = gzip.compress(json.dumps({"inputs": [GOOD]}).encode())
    assert client.request("POST", "/v1/models/digits/predict", content=content, headers=headers).status_code == 200


def test_a_body_that_is_too_long_once_decompressed_is_413(client: Client) -> None:
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    response = client.request("POST", "/v1/models/digits/predict", content=gzip.compress(b" " * 400_001), headers=headers)
    check(client, response, 413, "expected a body of at most 400000 bytes (max_body_bytes), got more once decompressed")


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "text/plain", "multipart/form-data"])
def test_what_is_not_announced_as_json_is_415(client: Client, content_type: str | None) -> None:
    """`curl -d` without `-H` sends the second of these."""
    headers = {"content-type": content_type} if content_type else {}
    response = client.request("POST", "/v1/models/digits/predict", content=b'{"inputs": []}', headers=headers)
    check(client, response, 415, "expected Content-Type application/json or application/octet-stream, got")


def test_json_may_be_announced_with_a_charset(client: Client) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    content = json.dumps({"inputs": [GOOD]}).encode()
    assert client.request("POST", "/v1/models/digits/predict", content=content, headers=headers).status_code == 200


def test_a_full_queue_is_429_with_retry_after(client: Client) -> None:
    """64 rows may wait here: of three requests of 40 rows sent at once, some wait, and the rest are told to come back."""
    import asyncio

    async def burst() -> list[object]:
        body = {"inputs": [_tensor()] * 40}
        calls = (client._http.post("/v1/models/digits/predict", json=body) for _ in range(8))
        return await asyncio.gather(*calls)

    responses = client.run(burst())
    statuses = {response.status_code for response in responses}
    assert statuses == {200, 429}
    for response in responses:
        if response.status_code == 429:
            assert response.headers["retry-after"] == "1"
            check(client, response, 429, "rows wait already")


def test_a_bug_is_500_and_tells_nothing(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("service.call.resolve_wish", broken)
    response = client.predict({"inputs": [GOOD]})
    assert response.status_code == 500
    assert response.json()["code"] == "internal"
    assert "secret" not in response.text
    monkeypatch.undo()
    assert client.predict({"inputs": [GOOD]}).status_code == 200


def test_of_a_million_unknown_members_one_is_enough() -> None:
    """Bug found: pydantic collected an error for each, for seconds, while the event loop stood still."""
    with pytest.raises(ValidationError, match="Extra inputs are not permitted") as caught:
        PredictRequest.model_validate({"inputs": [[1]]} | {str(number): 1 for number in range(100_000)})
    assert caught.value.error_count() == 1
    with pytest.raises(ValidationError) as caught:
        UnloadRequest.model_validate({"parameters": {str(number): 1 for number in range(100_000)}})
    assert caught.value.error_count() <= 2


def test_a_byte_order_mark_is_passed_over(client: Client) -> None:
    body = codecs.BOM_UTF8 + json.dumps({"inputs": [GOOD]}).encode()
    headers = {"content-type": "application/json"}
    assert client.request("POST", "/v1/models/digits/predict", content=body, headers=headers).status_code == 200
