"""What shows of a request's budget before it is read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.glimpse import glimpsed_budget_ms
from service.oip.schemas import InferenceRequest
from service.oip.wire import read_parameters
from service.wishes import with_headers

PREDICT = "/v1/models/digits/versions/1/predict"
RAW = (b"content-type", b"application/octet-stream")
HEADER = (b"x-latency-budget-ms", b"7")


@pytest.mark.parametrize(
    ("query", "headers", "body", "budget_ms"),
    [
        (b"latency_budget_ms=5&path=4", [RAW], b"", 5),
        (b"latency_budget_ms=5", [RAW, HEADER], b"", 5),
        (b"path=4", [RAW, HEADER], b"", 7),
        (b"path=4", [RAW], b"", None),
        (b"latency_budget_ms=0", [RAW], b"", None),  # to be refused by whoever reads it
        (b"nonsense=1", [RAW], b"", None),
        (b"", [], b'{"inputs": [1], "latency_budget_ms": 5}', 5),
        (b"", [HEADER], b'{"latency_budget_ms":5e1,"inputs":[1]}', 50),
        (b"latency_budget_ms=5", [], b'{"inputs": [1]}', None),  # not read there
        (b"", [HEADER], b'{"inputs": [1]}', 7),
        (b"", [HEADER], b'{"latency\\u005fbudget_ms": 5000}', None),
        (b"", [], b'{"latency_budget_ms": null}', None),
        (b"", [], b'{"latency_budget_ms": -5}', None),
        (b"", [], b'{"latency_budget_ms": 5', None),
        (b"", [], b'{"a": "latency_budget_ms", "latency_budget_ms": 5}', None),
        (b"", [(b"content-encoding", b"gzip")], b'{"latency_budget_ms": 5}', None),
        (b"", [], b'{"inputs": [' + b"1," * (1 << 17) + b'1], "latency_budget_ms": 5}', None),
    ],
)
def test_a_budget_is_glimpsed_where_it_shows_and_nothing_is_guessed(
    query: bytes, headers: list[tuple[bytes, bytes]], body: bytes, budget_ms: float | None
) -> None:
    assert glimpsed_budget_ms(PREDICT, query, headers, bytearray(body)) == budget_ms
    for other in ("/v2/models/digits", "/v2/repository/models/digits/load", "/v1/models/digits/audits/reset"):
        assert glimpsed_budget_ms(other, query, headers, bytearray(body)) is None


LENGTH = b"inference-header-content-length"
INFER = "/v2/models/digits/versions/1/infer"


@pytest.mark.parametrize(
    ("headers", "body", "budget_ms"),
    [
        ([], b'{"inputs": [], "parameters": {"latency_budget_ms": 5}}', 5),
        ([], b'{"parameters": {"latency_budget_ms": 5, "timeout": 4000}}', 4),
        ([], b'{"parameters": {"latency_budget_ms": 5, "timeout": 6000}}', 5),
        ([], b'{"parameters": {"timeout": 0}}', None),
        ([HEADER], b'{"parameters": {"timeout": 0}}', 7),
        ([HEADER], b'{"parameters": {"timeout": 8000}}', 7),
        ([HEADER], b'{"parameters": {"latency_budget_ms": 5}}', 5),
        ([HEADER], b'{"parameters": {"timeout": "soon"}}', None),
        ([HEADER], b'{"parameters": [1]}', None),
        ([HEADER], b"[1]", None),
        ([HEADER], b"{", None),
        ([(LENGTH, b"27"), HEADER], b'{"parameters":{"timeout":5}}"latency_budget_ms": 1', None),
        ([(LENGTH, b"28")], b'{"parameters":{"timeout":5}}"latency_budget_ms": 1', 0.005),
        ([(LENGTH, b"28"), (LENGTH, b"28")], b'{"parameters":{"timeout":5}}"latency_budget_ms": 1', None),
        ([(LENGTH, b"0"), HEADER], b'{"parameters":{"timeout":5}}', 7),
        ([(LENGTH, b"99"), HEADER], b"{}", None),
        ([(LENGTH, b"-1"), HEADER], b"{}", None),
        ([(LENGTH, b"many"), HEADER], b"{}", None),
        ([HEADER], b'{"inputs": [' + b"1," * 1024 + b"1]}", None),
        ([(b"content-encoding", b"gzip")], b'{"parameters": {"timeout": 6000}}', None),
    ],
)
def test_so_is_that_of_the_open_inference_protocol(
    headers: list[tuple[bytes, bytes]], body: bytes, budget_ms: float | None
) -> None:
    for path in ("/v2/models/digits/infer", INFER):
        assert glimpsed_budget_ms(path, b"", headers, bytearray(body)) == budget_ms


members = st.dictionaries(st.sampled_from(["timeout", "latency_budget_ms", "depth"]), st.integers(1, 10**6), max_size=3)


@given(members, members, members, st.booleans())
def test_it_is_what_the_request_itself_says_whatever_else_has_such_members(
    given_to_all: dict[str, int], of_input: dict[str, int], beside: dict[str, int], with_header: bool
) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "parameters": of_input}
    content = {**beside, "inputs": [tensor], "meta": beside, "parameters": given_to_all}
    headers = [HEADER] if with_header else []
    text = json.dumps(content).encode()
    expected = with_headers(read_parameters(InferenceRequest.model_validate_json(text).parameters), headers).budget_ms
    assert glimpsed_budget_ms(INFER, b"", headers, text) == expected


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5)),
    st.floats(1e-6, 1e9),
    st.sampled_from((None, 2)),
)
def test_of_flat_json_the_budget_is_what_a_parser_finds(
    others: dict[str, object], budget_ms: float, indent: int | None
) -> None:
    body = json.dumps({**others, "latency_budget_ms": budget_ms}, indent=indent)
    expected = None if "\\u" in body else budget_ms
    assert glimpsed_budget_ms(PREDICT, b"", [], bytearray(body, "utf-8")) == expected
