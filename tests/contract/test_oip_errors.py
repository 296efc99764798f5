"""Malformed requests of the Open Inference Protocol: always a 4xx of the one shape that says what was expected, and the
server serves on."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.contract.conftest import Client, left_to_the_collector

URL = "/v2/models/digits/infer"
PIXELS = [0.5] * 784
RAW = struct.pack("<784f", *PIXELS)
LENGTH = "Inference-Header-Content-Length"


def tensor(**members: object) -> dict[str, object]:
    found = {"name": "x", "shape": [1, 28, 28], "datatype": "FP32", "data": PIXELS} | members
    return {name: value for name, value in found.items() if value is not ...}


@dataclass(frozen=True)
class Case:
    content: bytes
    message: str
    status: int = 400
    code: str | None = "bad_request"
    headers: dict[str, str] = field(default_factory=dict)
    url: str = URL


def whole(body: object, message: str, status: int = 400, code: str = "bad_request", **more: object) -> Case:
    """A body of JSON alone."""
    return Case(json.dumps(body).encode(), message, status, code, **more)


def text(body: bytes, message: str = "the body is no JSON", status: int = 400, code: str = "malformed_input") -> Case:
    """A body that is no JSON, or that is sent as it stands."""
    return Case(body, message, status, code)


def one(message: str, status: int = 400, code: str = "bad_request", **members: object) -> Case:
    """One input that is wrong."""
    return whole({"inputs": [tensor(**members)]}, message, status, code)


def wish(message: str, status: int = 422, code: str = "invalid_input", **parameters: object) -> Case:
    """Wrong parameters."""
    return whole({"inputs": [tensor()], "parameters": parameters}, message, status, code)


def outputs(message: str, *asked: object) -> Case:
    """Wrong outputs."""
    return whole({"inputs": [tensor()], "outputs": list(asked)}, message)


def binary(
    binary_part: bytes,
    message: str,
    status: int = 400,
    code: str = "bad_request",
    length: Callable[[int], object] = lambda length: length,
    pack: Callable[[bytes], bytes] = lambda body: body,
    headers: dict[str, str] | None = None,
    **members: object,
) -> Case:
    """A tensor in binary. `length` makes the header of that name from the JSON's length, `pack` the body."""
    header = json.dumps({"inputs": [tensor(**{"data": ...} | members)]}).encode()
    return Case(pack(header + binary_part), message, status, code, {LENGTH: str(length(len(header)))} | (headers or {}))


def size(number: object = 3136) -> dict[str, object]:
    return {"binary_data_size": number}


def header(message: str, status: int = 422, code: str = "invalid_input", **headers: str) -> Case:
    named = {f"X-{name}".replace("_", "-"): value for name, value in headers.items()}
    return whole({"inputs": [tensor()]}, message, status, code, headers=named)


def packed(body: bytes, message: str, status: int = 400, code: str = "malformed_input", coding: str = "gzip") -> Case:
    return Case(body, message, status, code, {"Content-Encoding": coding})


GOOD = json.dumps({"inputs": [tensor()]}).encode()
NAN = struct.pack("<f", float("nan"))

CASES: dict[str, Case] = {
    # What is no JSON, or not an inference request
    "empty body": text(b""),
    "half an object": text(b'{"inputs": ['),
    "two objects": text(b"{} {}"),
    "single quotes": text(b"{'inputs': []}"),
    "trailing comma": text(b'{"inputs": [],}'),
    "not utf-8": text(b'{"inputs": [], "id": "\xff"}'),
    "utf-16": text(GOOD.decode().encode("utf-16")),
    "half a surrogate": text(b'{"inputs": [], "id": "\\ud800"}'),
    "deep nesting": text(b"[" * 100_000),
    "deep data": text(b'{"inputs": [{"data": ' + b"[" * 300),
    "a number of 5000 digits": text(GOOD.replace(b"[1,", b"[" + b"9" * 5000 + b",")),
    "the tensor without its JSON": text(RAW),
    "a list": whole([], "the body: Input should be an object"),
    "a string": whole("inputs", "the body: Input should be an object"),
    "null": whole(None, "the body: Input should be an object"),
    "no inputs": whole({}, "inputs: Field required"),
    "inputs null": whole({"inputs": None}, "inputs: Input should be a valid array"),
    "inputs an object": whole({"inputs": tensor()}, "inputs: Input should be a valid array"),
    "inputs a list of lists": whole({"inputs": [[]]}, "inputs.0: Input should be an object"),
    "a hundred thousand bad inputs": whole({"inputs": [0] * 100_000}, "inputs.0: Input should be an object"),
    "id a number": whole({"inputs": [tensor()], "id": 7}, "id: Input should be a valid string, got 7"),
    "id an object": whole({"inputs": [tensor()], "id": {}}, "id: Input should be a valid string"),
    "parameters a list": whole({"inputs": [tensor()], "parameters": []}, "parameters: Input should be"),
    "parameters a string": whole({"inputs": [tensor()], "parameters": "x"}, "parameters: Input should be"),
    "outputs an object": whole({"inputs": [tensor()], "outputs": {}}, "outputs: Input should be a valid array"),
    "the native protocol's body": whole({"inputs": [[PIXELS]], "depth": 2}, "inputs.0: Input should be an object"),
    # Names of inputs
    "no input": whole({"inputs": []}, "inputs: expected the one input 'x', got none"),
    "another name": one("inputs: expected the one input 'x', got 'y'", name="y"),
    "name in capitals": one("inputs: expected the one input 'x', got 'X'", name="X"),
    "empty name": one("inputs: expected the one input 'x', got ''", name=""),
    "no name": one("inputs.0.name: Field required", name=...),
    "name a number": one("inputs.0.name: Input should be a valid string, got 3", name=3),
    "very long name": one("inputs: expected the one input 'x', got 'yyyy", name="y" * 100_000),
    "the input twice": whole({"inputs": [tensor(), tensor()]}, "inputs: expected the one input 'x', got 'x', 'x'"),
    "an input too many": whole({"inputs": [tensor(), tensor(name="y")]}, "expected the one input 'x', got 'x', 'y'"),
    "a thousand inputs": whole({"inputs": [tensor(data=[])] * 1000}, "inputs: List should have at most 100 items"),
    "a thousand outputs": whole(
        {"inputs": [tensor()], "outputs": [{"name": "label"}] * 1000}, "outputs: List should have at most 100 items"
    ),
    # Datatypes
    "no datatype": one("inputs.0.datatype: Field required", datatype=...),
    "datatype a number": one("inputs.0.datatype: Input should be a valid string", datatype=32),
    "datatype of numpy": one("input 'x': expected datatype FP32, got 'float32'", datatype="float32"),
    "datatype in small letters": one("input 'x': expected datatype FP32, got 'fp32'", datatype="fp32"),
    "bytes": one("input 'x': expected datatype FP32, got 'BYTES'", datatype="BYTES"),
    "booleans": one("input 'x': expected datatype FP32, got 'BOOL'", datatype="BOOL"),
    "bfloat16": binary(b"\0" * 1568, "expected datatype FP32, got 'BF16'", datatype="BF16", parameters=size(1568)),
    # Shapes
    "no shape": one("inputs.0.shape: Field required", shape=...),
    "shape a number": one("inputs.0.shape: Input should be a valid array", shape=784),
    "shape of strings": one("inputs.0.shape.0: Input should be a valid integer", shape=["1", 28, 28]),
    "shape of fractions": one("inputs.0.shape.0: Input should be a valid integer", shape=[1.5, 28, 28]),
    "shape with true": one("inputs.0.shape.0: Input should be a valid integer", shape=[True, 28, 28]),
    "shape with null": one("inputs.0.shape.1: Input should be a valid integer", shape=[1, None, 28]),
    "empty shape": one("input 'x': expected shape [-1, 28, 28], got []", shape=[]),
    "shape of one row": one("input 'x': expected shape [-1, 28, 28], got [28, 28]", shape=[28, 28]),
    "flat shape": one("input 'x': expected shape [-1, 28, 28], got [1, 784]", shape=[1, 784]),
    "a dimension too many": one("input 'x': expected shape [-1, 28, 28], got [1, 1, 28, 28]", shape=[1, 1, 28, 28]),
    "wrong last dimension": one("expected shape [-1, 28, 28], got [1, 28, 27]", shape=[1, 28, 27], data=[0.5] * 756),
    "rows last": one("input 'x': expected shape [-1, 28, 28], got [28, 28, 1]", shape=[28, 28, 1]),
    "negative rows": one("input 'x': expected 1 to 40 rows, got -1", shape=[-1, 28, 28]),
    "negative pixels": one("input 'x': expected shape [-1, 28, 28], got [1, -28, -28]", shape=[1, -28, -28]),
    "no rows": one("input 'x': expected 1 to 40 rows, got 0", shape=[0, 28, 28], data=[]),
    "too many rows": binary(b"", "input 'x': expected 1 to 40 rows, got 41", shape=[41, 28, 28], parameters=size()),
    "rows beyond 64 bits": one("input 'x': expected 1 to 40 rows, got 1000000", shape=[10**30, 28, 28]),
    "a hundred thousand dimensions": one("input 'x': expected shape [-1, 28, 28]", shape=[1] * 100_000),
    # JSON data
    "neither data nor binary": one("input 'x': expected data or binary_data_size, got neither", data=...),
    "data null": one("input 'x': expected data or binary_data_size, got neither", data=None),
    "data a number": one("inputs.0.data: Input should be a valid array", data=0.5),
    "data base64": one("inputs.0.data: Input should be a valid array", data="AAAA"),
    "empty data": one("expected 784 values, flat or nested to shape [1, 28, 28], got 0", data=[]),
    "a value too few": one("input 'x': expected 784 values, flat or nested", data=[0.5] * 783),
    "a value too many": one("input 'x': expected 784 values, flat or nested", data=[0.5] * 785),
    "data of another shape": one("got [1, 784]", data=[PIXELS]),
    "ragged data": one("expected numbers, got lists of uneven lengths", data=[[[0.5] * 28] * 27 + [[0.5]]]),
    "data of strings": one("expected numbers, got other values among them", data=["0.5"] * 784),
    "a string in data": one("expected numbers, got other values among them", data=["0.5", *PIXELS[1:]]),
    "null in data": one("expected numbers, got other values among them", data=[None, *PIXELS[1:]]),
    "data of booleans": one("expected numbers, got other values among them", data=[True] * 784),
    "data of objects": one("expected numbers, got other values among them", data=[{}] * 784),
    "data beyond 64 bits": one("expected numbers, got other values among them", data=[10**30] + [0] * 783),
    "fractions as integers": one("expected INT32 values, got others among them", datatype="INT32"),
    "an integer too large": one("expected UINT8 values, got others", datatype="UINT8", data=[256] + [0] * 783),
    "an integer below zero": one("expected UINT64 values, got others", datatype="UINT64", data=[-1] + [0] * 783),
    "NaN in data": text(GOOD.replace(b"0.5", b"NaN", 1), "x[0]: expected finite numbers", 422, "invalid_input"),
    "infinity in data": text(GOOD.replace(b"0.5", b"-Infinity", 1), "x[0]: expected finite numbers", 422, "invalid_input"),
    "too large for float32": one("x[0]: expected finite numbers", 422, "invalid_input", data=[1e300] * 784),
    "bytes as pixels": one("expected pixels between 0 (black) and 1 (white)", 422, "invalid_input", data=[255] * 784),
    "negative pixel": one("values from -0.1 to 0.5", 422, "invalid_input", data=[-0.1, *PIXELS[1:]]),
    # Binary data
    "size without binary": one("input 'x': expected 3136 bytes after the JSON, got 0", data=..., parameters=size()),
    "a byte too few": binary(RAW[1:], "expected 3136 bytes after the JSON, got 3135", parameters=size()),
    "a byte too many": binary(RAW + b"\0", "expected 3136 bytes after the JSON, got 3137", parameters=size()),
    "two tensors' bytes": binary(RAW * 2, "expected 3136 bytes after the JSON, got 6272", parameters=size()),
    "bytes that nobody claims": binary(RAW, "got 3136 bytes that no input claims"),
    "bytes beside data": binary(RAW, "got 3136 bytes that no input claims", data=PIXELS),
    "data and a size": binary(RAW, "either data or binary_data_size, got both", data=PIXELS, parameters=size()),
    "size too small": binary(RAW[4:], "expected binary_data_size 3136 for FP32", parameters=size(3132)),
    "size of another datatype": binary(RAW, "expected binary_data_size 6272 for FP64", datatype="FP64", parameters=size()),
    "size negative": binary(RAW, "expected binary_data_size 3136 for FP32", parameters=size(-3136)),
    "size huge": binary(RAW, "expected binary_data_size 3136 for FP32", parameters=size(2**70)),
    "size a string": binary(RAW, "expected binary_data_size 3136 for FP32", parameters=size("3136")),
    "size true": binary(RAW, "expected binary_data_size 3136 for FP32", parameters=size(True)),
    "size a fraction": binary(RAW, "expected binary_data_size 3136 for FP32", parameters=size(3136.0)),
    "size a list": binary(RAW, "expected a string, number or boolean as 'binary_data_size'", parameters=size([3136])),
    "rows without their bytes": binary(RAW, "binary_data_size 6272 for FP32", shape=[2, 28, 28], parameters=size()),
    "shared memory": binary(b"", "got neither", parameters={"shared_memory_region": "a", "shared_memory_byte_size": 3136}),
    "NaN in binary": binary(NAN + RAW[4:], "x[0]: expected finite", 422, "invalid_input", parameters=size()),
    "infinity in the last row": binary(
        RAW * 2 + struct.pack("<784f", *PIXELS[1:], float("inf")),
        "x[2]: expected finite numbers",
        422,
        "invalid_input",
        shape=[3, 28, 28],
        parameters=size(9408),
    ),
    # The length of the JSON
    "length beyond the body": binary(RAW, "to be within the body's", length=lambda n: n + 3137, parameters=size()),
    "length beyond 64 bits": binary(RAW, f"expected {LENGTH} to be a number", length=lambda n: 10**30, parameters=size()),
    "length negative": binary(RAW, f"expected {LENGTH} to be a number", length=lambda n: -n, parameters=size()),
    "length a word": binary(RAW, f"expected {LENGTH} to be a number", length=lambda n: "long", parameters=size()),
    "length empty": binary(RAW, f"expected {LENGTH} to be a number", length=lambda n: "", parameters=size()),
    "length a fraction": binary(RAW, f"expected {LENGTH} to be a number", length=lambda n: f"{n}.0", parameters=size()),
    "length hexadecimal": binary(RAW, f"expected {LENGTH} to be a number", length=hex, parameters=size()),
    "length a byte short": binary(RAW, "is no JSON", 400, "malformed_input", length=lambda n: n - 1, parameters=size()),
    "length a byte long": binary(RAW, "is no JSON", 400, "malformed_input", length=lambda n: n + 1, parameters=size()),
    "no length": Case(GOOD + RAW, "the body is no JSON", 400, "malformed_input"),
    "raw body too short": Case(RAW[1:], "expected binary_data_size 3136", headers={LENGTH: "0"}),
    "raw body of two rows": Case(RAW * 2, "expected binary_data_size 3136", headers={LENGTH: "0"}),
    "raw body empty": Case(b"", "expected binary_data_size 3136", headers={LENGTH: "0"}),
    "raw body of JSON": Case(GOOD, "expected binary_data_size 3136", headers={LENGTH: "0"}),
    "raw body of NaN": Case(NAN * 784, "expected finite numbers", 422, "invalid_input", headers={LENGTH: "0"}),
    # Outputs
    "unknown output": outputs("outputs: expected some of probabilities, logits, label", {"name": "y"}),
    "unknown among known": outputs("got 'state'", {"name": "label"}, {"name": "state"}),
    "output without a name": outputs("outputs.0.name: Field required", {}),
    "output a string": outputs("outputs.0: Input should be an object", "label"),
    "output twice": outputs("expected each once, got 'label' several times", {"name": "label"}, {"name": "label"}),
    "classification": outputs(
        "classification is not served", {"name": "probabilities", "parameters": {"classification": 3}}
    ),
    "output to shared memory": outputs(
        "shared_memory_region is not served", {"name": "label", "parameters": {"shared_memory_region": "a"}}
    ),
    "binary_data a number": outputs("binary_data to be a boolean", {"name": "label", "parameters": {"binary_data": 1}}),
    "binary_data a list": outputs("outputs.0.parameters", {"name": "label", "parameters": {"binary_data": [True]}}),
    # Parameters
    "unknown parameter": wish("expected some of depth, path", 400, "bad_request", budget_ms=5),
    "twenty thousand parameters": wish("got 'x0'", 400, "bad_request", **{f"x{n}": 0 for n in range(20_000)}),
    "sequence": wish("got 'sequence_id'", 400, "bad_request", sequence_id=1, sequence_start=True, sequence_end=True),
    "parameter a list": wish("expected a string, number or boolean as 'depth', got list", 400, "bad_request", depth=[1]),
    "parameter an object": wish("expected a string, number or boolean as 'path', got dict", 400, "bad_request", path={}),
    "parameter null": wish("as 'depth', got NoneType", 400, "bad_request", depth=None),
    "depth 0": wish("depth: Input should be greater than or equal to 1, got 0", depth=0),
    "depth 1.5": wish("parameters: depth", depth=1.5),
    "depth a string": wish("parameters: depth", depth="3"),
    "depth true": wish("parameters: depth", depth=True),
    "depth not offered": wish("depth 8 is not offered: expected one of 1, 2, 3", 422, "not_offered", depth=8),
    "path of no tree": wish("4 -> 7 is no hop", path="4-7"),
    "path a number": wish("path: Input should be a valid string, got 4", path=4),
    "path not written as one": wish("a path is node numbers joined by '-'", path="4,6"),
    "budget 0": wish("latency_budget_ms: Input should be greater than 0", latency_budget_ms=0),
    "budget negative": wish("latency_budget_ms: Input should be greater than 0", latency_budget_ms=-5),
    "budget a string": wish("latency_budget_ms: Input should be a valid number", latency_budget_ms="5"),
    "budget NaN": wish("latency_budget_ms", latency_budget_ms=float("nan")),
    "budget infinite": wish("latency_budget_ms", latency_budget_ms=float("inf")),
    "confidence above 1": wish("min_confidence: Input should be less than or equal to 1", min_confidence=1.5),
    "confidence below 0": wish("min_confidence: Input should be greater than or equal to 0", min_confidence=-1),
    "risk 1": wish("max_risk: Input should be less than 1", max_risk=1),
    "risk not certified": wish("max_risk 0.123 is not certified", 422, "not_offered", max_risk=0.123),
    "two wishes": wish("give only one of depth, path, min_confidence and max_risk", depth=1, min_confidence=0.5),
    "strict a string": wish("strict: Input should be a valid boolean", strict="true"),
    "timeout negative": wish("timeout: Input should be greater than or equal to 0", timeout=-1),
    "timeout a fraction": wish("timeout: Input should be a valid integer", timeout=0.5),
    "timeout beyond 64 bits": wish("timeout: Input should be less than", timeout=2**63),
    "timeout a string": wish("timeout: Input should be a valid integer", timeout="1000"),
    "priority negative": wish("priority: Input should be greater than or equal to 0", priority=-1),
    "priority a string": wish("priority: Input should be a valid integer", priority="high"),
    "priority true": wish("priority: Input should be a valid integer", priority=True),
    "binary_data_output a string": wish("binary_data_output: Input should be a valid boolean", binary_data_output="yes"),
    # Headers
    "header depth a word": header("depth: Input should be", Depth="deep"),
    "header depth not offered": header("depth 9 is not offered", 422, "not_offered", Depth="9"),
    "header path of no tree": header("4 -> 7 is no hop", Path="4-7"),
    "header budget a word": header("header X-Latency-Budget-Ms: expected a number, got 'soon'", Latency_Budget_Ms="soon"),
    "header budget NaN": header("header X-Latency-Budget-Ms: expected a number", Latency_Budget_Ms="NaN"),
    "header confidence above 1": header("min_confidence: Input should be less", Min_Confidence="2"),
    "header risk 0": header("max_risk: Input should be greater", Max_Risk="0"),
    "header strict a word": header("header X-Strict: expected true or false", Strict="perhaps"),
    "headers that exclude each other": header("give only one of depth, path", Depth="1", Path="4"),
    # Content types and encodings
    "a form": whole(
        {}, "expected Content-Type", 415, "unsupported_media_type", headers={"Content-Type": "multipart/form-data"}
    ),
    "curl's default": whole(
        {},
        "got 'application/x-www-form",
        415,
        "unsupported_media_type",
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    ),
    "unknown encoding": packed(GOOD, "expected Content-Encoding gzip", 415, "unsupported_media_type", "br"),
    "encoded twice": packed(
        gzip.compress(gzip.compress(GOOD)), "got 'gzip, gzip'", 415, "unsupported_media_type", "gzip, gzip"
    ),
    "not gzip": packed(GOOD, "the body cannot be read as gzip"),
    "not deflate": packed(GOOD, "the body cannot be read as deflate", coding="deflate"),
    "deflate as gzip": packed(zlib.compress(GOOD), "the body cannot be read as gzip"),
    "gzip as deflate": packed(gzip.compress(GOOD), "the body cannot be read as deflate", coding="deflate"),
    "deflate without its frame": packed(zlib.compress(GOOD, wbits=-15), "cannot be read as deflate", coding="deflate"),
    "gzip of nothing": packed(b"", "the gzip stream of the body is cut short"),
    "half a gzip": packed(gzip.compress(GOOD)[:60], "the gzip stream of the body is cut short"),
    "gzip without its checksum": packed(gzip.compress(GOOD)[:-8], "the gzip stream of the body is cut short"),
    "gzip with a wrong checksum": packed(gzip.compress(GOOD)[:-8] + b"\0" * 8, "the body cannot be read as gzip"),
    "gzip and more": packed(gzip.compress(GOOD) + b"more", "goes on after the end of its gzip stream"),
    "two gzips": packed(gzip.compress(GOOD) * 2, "goes on after the end of its gzip stream"),
    "half a deflate": packed(zlib.compress(GOOD)[:60], "the deflate stream of the body is cut short", coding="deflate"),
    "gzip bomb": packed(gzip.compress(b" " * 100_000_000), "got more once decompressed", 413, "body_too_large"),
    "deflate bomb": packed(zlib.compress(b"[" * 100_000_000), "got more once", 413, "body_too_large", "deflate"),
    "length of the compressed JSON": binary(
        RAW,
        "is no JSON",
        400,
        "malformed_input",
        length=lambda n: n // 2,
        pack=gzip.compress,
        headers={"Content-Encoding": "gzip"},
        parameters=size(),
    ),
    "body too long": Case(b" " * 400_001, "expected a body of at most 400000 bytes", 413, "body_too_large"),
    # Models and versions
    "unknown model": Case(GOOD, "no model 'cats' is served", 404, "unknown_model", url="/v2/models/cats/infer"),
    "unknown version": Case(
        GOOD,
        "version '2' of digits is not served here: expected 1",
        404,
        "unknown_version",
        url="/v2/models/digits/versions/2/infer",
    ),
    "version no number": Case(
        GOOD, "version 'latest' of digits", 404, "unknown_version", url="/v2/models/digits/versions/latest/infer"
    ),
    "path traversal": Case(GOOD, "", 404, None, url="/v2/models/..%2f..%2fetc%2fpasswd/infer"),
    "no such call": Case(GOOD, "there is nothing at", 404, "not_found", url="/v2/models/digits/explain"),
    "a slash too many": Case(GOOD, "there is nothing at", 404, "not_found", url="/v2/models/digits/infer/"),
    "post to a get": Case(GOOD, "POST is not possible", 405, "method_not_allowed", url="/v2/models/digits/config"),
    "index no JSON": Case(b"{", "Invalid JSON", 400, "bad_request", url="/v2/repository/index"),
    "index ready a string": whole({"ready": "yes"}, "ready: Input should be a valid boolean", url="/v2/repository/index"),
}


@pytest.mark.parametrize("name", CASES)
def test_malformed_requests_are_refused_and_the_server_serves_on(client: Client, name: str) -> None:
    case = CASES[name]
    response = client.request("POST", case.url, content=case.content, headers=case.headers)
    assert response.status_code == case.status, response.text
    content = response.json()
    assert content["code"] == case.code or case.code is None
    assert isinstance(content["code"], str)
    assert case.message in content["error"]
    assert len(content["error"]) < 600
    assert client.request("POST", URL, content=GOOD).status_code == 200


def test_what_was_refused_is_let_go(client: Client) -> None:
    with left_to_the_collector() as left:
        for case in CASES.values():
            client.request("POST", case.url, content=case.content, headers=case.headers)
    assert not left
