from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import numpy as np
import pytest
from PIL import Image

from hbll.client.errors import (
    DeadlineExceeded,
    HbllError,
    InvalidRequest,
    NotServed,
    Refused,
    ServerFailed,
    Unauthorized,
    Unavailable,
    UnexpectedAnswer,
    error_of,
)
from hbll.client.events import EventReader, read_events
from hbll.client.inputs import rows_of
from hbll.client.requests import budget_of, content_of, model_path, plan_request, predict_request, stream_request
from service.wishes import with_query

SHAPE = (2, 3)
ROW = np.arange(6, dtype=np.float32).reshape(SHAPE)


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("inputs", "rows"),
    [
        (ROW, [ROW]),
        (np.stack([ROW, ROW + 1]), [ROW, ROW + 1]),
        ([ROW, ROW + 1], [ROW, ROW + 1]),
        ((ROW.astype(np.float64),), [ROW]),
        (ROW.astype(np.int8).T.copy().T, [ROW]),
        (ROW.astype(">f4"), [ROW]),
    ],
    ids=["one", "batch", "list", "double", "integers in Fortran order", "big endian"],
)
def test_arrays_become_rows_of_little_endian_singles(inputs: object, rows: list[np.ndarray]) -> None:
    found = rows_of(inputs, SHAPE)  # type: ignore[arg-type]
    request = predict_request("m", found, {"depth": 2, "strict": True, "min_confidence": None})
    assert request.headers["Content-Type"] == "application/octet-stream"
    assert request.body is not None
    np.testing.assert_array_equal(np.frombuffer(request.body, "<f4").reshape(-1, *SHAPE), rows)


def test_arrays_for_a_model_of_tokens_become_rows_of_whole_numbers() -> None:
    tokens = np.array([[1, 2, 3], [4, 5, 400]], np.uint16)
    (row,) = rows_of(tokens, SHAPE, "INT64")
    assert predict_request("m", [row], {}).body == tokens.astype("<i8").tobytes()
    (sent,) = json.loads(stream_request("m", [row], {}).body or b"")["inputs"]
    assert sent == {
        "tensor": base64.b64encode(tokens.astype("<i8").tobytes()).decode(),
        "datatype": "INT64",
        "shape": [2, 3],
    }
    with pytest.raises(InvalidRequest, match="expected an array of tokens, whole numbers, got dtype float32"):
        rows_of(ROW, SHAPE, "INT64")


def test_pictures_are_sent_as_files_whatever_they_come_as(tmp_path: Path) -> None:
    grey, cmyk = Image.new("L", (5, 4), 7), Image.new("CMYK", (5, 4), (0, 255, 255, 0))
    file = tmp_path / "picture.png"
    file.write_bytes(png(grey))
    rows = rows_of([file, str(file), png(grey), grey, cmyk], None)
    assert rows[:4] == [png(grey)] * 4
    assert isinstance(rows[4], bytes)
    assert Image.open(io.BytesIO(rows[4])).convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_arrays_and_pictures_mix_in_order_as_json() -> None:
    picture = png(Image.new("L", (5, 4)))
    request = predict_request("m", rows_of([picture, ROW], SHAPE), {"max_risk": 0.1, "probabilities": True})
    assert request.headers["Content-Type"] == "application/json"
    body = json.loads(request.body or b"")
    assert [sorted(row) for row in body.pop("inputs")] == [["image"], ["datatype", "shape", "tensor"]]
    assert body == {"max_risk": 0.1, "probabilities": True}
    assert json.loads(stream_request("m", rows_of(ROW, SHAPE), {"monotone": True}).body or b"")["monotone"] is True


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((3, 2)), r"inputs: expected shape \(2, 3\) or \(rows, 2, 3\), got \(3, 2\)"),
        (np.zeros((0, 2, 3)), "expected at least one row, got none"),
        ([], "expected at least one row, got none"),
        ([ROW, ROW[None]], r"inputs\[1\]: expected shape \(2, 3\), got \(1, 2, 3\)"),
        ([np.array([["a"] * 3] * 2)], r"inputs\[0\]: expected an array of numbers, got dtype <U1"),
        ([[1.0, 2.0]], r"inputs\[0\]: expected a numpy array, an image of PIL, .*, got list"),
        (None, "got NoneType"),
        (["no/such/file"], "'no/such/file' cannot be read"),
        (["a\0b"], "cannot be read"),
    ],
)
def test_what_cannot_be_an_input_is_told_before_anything_is_sent(inputs: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        rows_of(inputs, SHAPE)  # type: ignore[arg-type]


def test_the_query_of_a_raw_body_is_what_the_server_reads() -> None:
    wishes = {"min_confidence": np.float32(1e-7), "strict": True, "probabilities": True, "path": None}
    request = predict_request("m", [ROW], wishes)  # type: ignore[arg-type]
    read = with_query("&".join(f"{name}={value}" for name, value in request.query.items()).encode())
    assert (read.min_confidence, read.strict, read.probabilities) == (float(np.float32(1e-7)), True, True)
    assert plan_request("m", None, 3, {"latency_budget_ms": 5}).query == {"rows": "3", "latency_budget_ms": "5.0"}


def test_a_budget_is_added_when_a_request_is_sent_and_can_change() -> None:
    request = predict_request("m", [ROW], {"latency_budget_ms": 50})
    assert request.query == {}
    first, second = request.within(48.5), request.within(0.1 + 0.2)
    assert [each.headers["X-Latency-Budget-Ms"] for each in (first, second)] == ["48.5", "0.30000000000000004"]
    assert first.body is second.body
    assert request.within(None) == request


@pytest.mark.parametrize("budget_ms", [0, -1, float("nan"), float("inf"), "soon"])
def test_a_budget_that_is_none_is_told(budget_ms: object) -> None:
    with pytest.raises(InvalidRequest, match="latency_budget_ms: expected a"):
        budget_of({"latency_budget_ms": budget_ms})  # type: ignore[typeddict-item]


def test_a_model_stays_one_part_of_the_url() -> None:
    assert model_path("a/../b?c", None) == "/v1/models/a%2F..%2Fb%3Fc"
    assert model_path("m", 3) == "/v1/models/m/versions/3"
    for name in ("", ".", ".."):
        with pytest.raises(InvalidRequest, match="expected a name"):
            model_path(name, None)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (401, Unauthorized),
        (403, Unauthorized),
        (404, NotServed),
        (413, InvalidRequest),
        (415, InvalidRequest),
        (422, InvalidRequest),
        (408, Unavailable),
        (431, InvalidRequest),
        (429, Refused),
        (500, ServerFailed),
        (501, ServerFailed),
        (502, Unavailable),
        (503, Unavailable),
        (504, DeadlineExceeded),
    ],
)
def test_every_status_is_an_error_of_its_kind_with_all_that_was_said(status: int, kind: type[HbllError]) -> None:
    content = {"error": "a sentence", "code": "a_code", "smallest_feasible_budget_ms": 7.5}
    with pytest.raises(HbllError, match=f"^the server answered {status}: a sentence$") as caught:
        content_of(status, json.dumps(content).encode())
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.message) == (status, "a_code", "a sentence")
    assert error.details == {"smallest_feasible_budget_ms": 7.5}
    assert not isinstance(error, DeadlineExceeded) or error.smallest_feasible_budget_ms == 7.5


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>"), (200, b"[1]"), (302, b""), (404, b"<html>not here</html>")])
def test_another_server_is_recognised(status: int, body: bytes) -> None:
    with pytest.raises(UnexpectedAnswer, match="HBLL server"):
        content_of(status, body)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("2", 2.0),
        (None, None),
        ("soon", None),
        ("-1", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        (f"Wed, {'9' * 20} Oct 2015 07:28:00 GMT", None),
    ],
)
def test_retry_after_is_read_in_both_forms(header: str | None, seconds: float | None) -> None:
    assert error_of(429, {"error": "full", "code": "queue_full"}, header).retry_after_s == seconds


def test_events_are_put_together_from_lines() -> None:
    reader = EventReader()
    lines = [": a comment", "", "event: answer", 'data: {"row":', "data: 1}", "", "event:end", "data:2", ""]
    assert [event for line in lines if (event := reader.feed(line))] == [("answer", {"row": 1}), ("end", 2)]
    reader.feed("data: {")
    with pytest.raises(UnexpectedAnswer, match="expected an event with JSON"):
        reader.feed("")


def test_lines_of_events_end_by_line_feeds_alone() -> None:
    """Bug found: labels with what else Unicode ends lines by broke the stream."""
    text = 'event: answer\r\ndata: {"label": "a\x85b\u2028c"}\r\n\r\nevent: end\ndata: 2\n\n'

    async def pieces(size: int) -> AsyncIterator[str]:
        for start in range(0, len(text), size):
            yield text[start : start + size]

    async def events(size: int) -> list[tuple[str, object]]:
        return [event async for event in read_events(pieces(size))]

    for size in (1, 7, 1000):
        assert anyio.run(events, size) == [("answer", {"label": "a\x85b\u2028c"}), ("end", 2)]
