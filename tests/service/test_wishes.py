from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidInput
from service.schemas import PredictRequest, StreamRequest, Wishes
from service.wishes import glimpsed_budget_ms, with_headers


def merged(body: Wishes, **headers: str) -> Wishes:
    return with_headers(body, [(f"x-{name}".replace("_", "-").encode(), value.encode()) for name, value in headers.items()])


@pytest.mark.parametrize(
    ("header", "value", "name", "expected"),
    [
        ("depth", "3", "depth", 3),
        ("depth", "best", "depth", "best"),
        ("path", "4-6", "path", "4-6"),
        ("latency_budget_ms", "12.5", "latency_budget_ms", 12.5),
        ("latency_budget_ms", " 5 ", "latency_budget_ms", 5),
        ("min_confidence", "9e-1", "min_confidence", 0.9),
        ("max_risk", "0.05", "max_risk", 0.05),
        ("strict", "True", "strict", True),
        ("strict", "0", "strict", False),
    ],
)
def test_every_wish_can_come_as_a_header(header: str, value: str, name: str, expected: object) -> None:
    assert getattr(merged(Wishes(), **{header: value}), name) == expected


def test_without_headers_the_body_is_left_alone() -> None:
    body = PredictRequest(inputs=[1])
    assert merged(body, accept="text/html") is body


def test_the_body_wins() -> None:
    assert merged(Wishes(latency_budget_ms=5), latency_budget_ms="7").latency_budget_ms == 5
    assert merged(Wishes(strict=False), strict="true").strict is False


def test_a_header_about_depth_does_not_quarrel_with_a_body_about_depth() -> None:
    """As where a proxy sets a default confidence for all that passes."""
    wishes = merged(Wishes(depth=2), min_confidence="0.9", latency_budget_ms="7")
    assert (wishes.wishes, wishes.depth, wishes.latency_budget_ms) == (["depth"], 2, 7)


def test_null_in_the_body_is_silence() -> None:
    assert merged(Wishes(depth=None), depth="2").depth == 2


def test_the_rest_of_the_body_stays() -> None:
    body = merged(StreamRequest(inputs=[1, [2]], probabilities=True, monotone=True), depth="2")
    assert body == StreamRequest(inputs=[1, [2]], probabilities=True, monotone=True, depth=2)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"depth": "deep"}, "depth: "),
        ({"depth": "0"}, "depth: Input should be greater than or equal to 1"),
        ({"depth": "²"}, "depth: "),
        ({"depth": "1" * 5000}, "depth: "),
        ({"latency_budget_ms": "soon"}, "header X-Latency-Budget-Ms: expected a number, got 'soon'"),
        ({"latency_budget_ms": ""}, "expected a number, got ''"),
        ({"latency_budget_ms": "nan"}, "expected a number, got 'nan'"),
        ({"latency_budget_ms": "1_0"}, "expected a number, got '1_0'"),
        ({"latency_budget_ms": "1e999"}, "latency_budget_ms: Input should be a finite number"),
        ({"latency_budget_ms": "-1"}, "latency_budget_ms: Input should be greater than 0"),
        ({"min_confidence": "1.1"}, "min_confidence: Input should be less than or equal to 1"),
        ({"max_risk": "0"}, "max_risk: Input should be greater than 0"),
        ({"strict": "perhaps"}, "header X-Strict: expected true or false, got 'perhaps'"),
        ({"depth": "1", "path": "4"}, "give only one of depth, path, min_confidence and max_risk, got depth and path"),
    ],
)
def test_bad_headers_are_named(headers: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        merged(Wishes(), **headers)
    assert message in str(caught.value)


def test_a_header_that_comes_twice_is_refused() -> None:
    with pytest.raises(InvalidInput, match="header X-Depth: expected one, got several"):
        with_headers(Wishes(), [(b"x-depth", b"1"), (b"x-depth", b"1")])


def test_headers_obey_the_rules_of_the_whole_request() -> None:
    with pytest.raises(InvalidInput, match="monotone"):
        merged(StreamRequest(inputs=[1], monotone=True), max_risk="0.05")


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


@pytest.mark.parametrize(
    ("headers", "body", "budget_ms"),
    [
        ([], b'{"inputs": [], "parameters": {"latency_budget_ms": 5}}', 5),
        ([], b'{"parameters": {"latency_budget_ms": 5, "timeout": 4000}}', 4),
        ([], b'{"parameters": {"latency_budget_ms": 5, "timeout": 6000}}', 5),
        ([], b'{"parameters": {"timeout": 6000}}', 6),
        ([], b'{"parameters": {"timeout": 0}}', None),
        ([HEADER], b'{"parameters": {"timeout": 0}}', 7),
        ([HEADER], b'{"parameters": {"timeout": 8000}}', 7),
        ([HEADER], b'{"parameters": {"latency_budget_ms": 5}}', 5),
        ([HEADER], b'{"inputs": [{"name": "timeout"}]}', None),
        ([HEADER], b'{"outputs": [{"parameters": {"timeout": 5}}], "parameters": {"timeout": 6}}', None),
        ([(LENGTH, b"26"), HEADER], b'{"parameters":{"timeout":5}}"latency_budget_ms": 1', None),
        ([(LENGTH, b"29")], b'{"parameters":{"timeout":50}}"latency_budget_ms": 1', 0.05),
        ([(LENGTH, b"0"), HEADER], b'{"latency_budget_ms": 1}', 7),
        ([(LENGTH, b"many"), HEADER], b"{}", None),
        ([(b"content-encoding", b"gzip")], b'{"parameters": {"timeout": 6000}}', None),
    ],
)
def test_so_is_that_of_the_open_inference_protocol(
    headers: list[tuple[bytes, bytes]], body: bytes, budget_ms: float | None
) -> None:
    for path in ("/v2/models/digits/infer", "/v2/models/digits/versions/1/infer"):
        assert glimpsed_budget_ms(path, b"", headers, bytearray(body)) == budget_ms


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
