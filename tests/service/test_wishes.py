from __future__ import annotations

import pytest

from service.errors import InvalidInput
from service.schemas import PredictRequest, StreamRequest, Wishes
from service.wishes import with_headers


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
