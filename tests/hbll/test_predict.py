"""`hbll predict` against a server that is made up, and tables as training reads them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from hbll import predict as command
from hbll.cli import main
from hbll.client import Client
from hbll.table import TableError, read_rows
from training.data_config import TableConfig
from training.sources import load_data

FEATURES = ["width", "height", "depth"]
ROWS = [[3.5, 1, 2], [0, 9, 1], [1, 2, 4], [8, 0, 0]]
LARGEST = ["width", "height", "depth", "width"]


class Server:
    """Answers with the name of a row's largest value; of pictures with the first. `asked`: rows of each prediction."""

    def __init__(self, features: Sequence[str] | None) -> None:
        self.features = features
        self.asked: list[int] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        detail = {"name": "parts", "version": 2, "ready": True, "hierarchy_depth": 2, "input_shape": [3], "labels": FEATURES,
                  "features": self.features, "reference": "2", "climb": ["2"], "risk_levels": [], "paths": []}  # fmt: skip
        if request.method == "GET":
            return httpx.Response(200, json={"models": [detail]} if request.url.path == "/v1/models" else detail)
        if request.headers["content-type"] == "application/json":
            content = json.loads(request.content)
            likeliest, wishes = [0] * len(content["inputs"]), content
        else:
            likeliest = np.frombuffer(request.content, "<f4").reshape(-1, 3).argmax(axis=1).tolist()
            wishes = dict(request.url.params)
        self.asked.append(len(likeliest))
        rows = [
            {"label": FEATURES[index], "confidence": 0.5, "depth": 1, "path": "2", "stopped_by": "complete"}
            for index in likeliest
        ]
        if str(wishes.get("probabilities")).lower() == "true":
            rows = [row | {"probabilities": dict.fromkeys(FEATURES, 0.25) | {row["label"]: 0.5}} for row in rows]
        if request.url.path.endswith("/stream"):
            events = [("answer", row | {"row": n, "final": True, "total_ms": 0.5}) for n, row in enumerate(rows)]
            text = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in [*events, ("end", _about([]))])
            return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})
        return httpx.Response(200, json=_about(rows))


def _about(rows: list[dict[str, object]]) -> dict[str, object]:
    times = {"queue_ms": 0.1, "compute_ms": 0.2, "total_ms": 0.4}
    return {"model": "parts", "version": 2, "predictions": rows, "deadline_met": None, "risk": None, **times}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server(FEATURES)
    monkeypatch.setattr(command, "Client", partial(Client, transport=httpx.MockTransport(server)))
    return server


def ask(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


def write(file: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([header, *rows])
    return file


def reordered(file: Path) -> Path:
    return write(file, ["depth", "width", "height"], [[c, a, b] for a, b, c in ROWS])


def test_columns_of_a_table_are_matched_by_name(server: Server, tmp_path: Path) -> None:
    done = ask(reordered(tmp_path / "parts.csv"), "--json")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["label"] for line in lines] == LARGEST
    assert lines[1] == {
        "file": str(tmp_path / "parts.csv"), "row": 2, "label": "height", "confidence": 0.5, "depth": 1, "path": "2",
        "stopped_by": "complete", "model": "parts", "version": 2, "deadline_met": None,
    }  # fmt: skip


def test_parquet_is_read_too(server: Server, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = {name: [row[index] for row in ROWS] for index, name in reversed(list(enumerate(FEATURES)))}
    parquet.write_table(pa.table(columns), tmp_path / "parts.parquet")
    done = ask(tmp_path / "parts.parquet", "--json")
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == LARGEST


def test_a_table_is_read_as_training_reads_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [[round(rng.standard_normal(), 3), int(rng.integers(9)), n % 3 == 0, f"class {n % 2}"] for n in range(60)]
    header = [*FEATURES, "state"]
    data = load_data(TableConfig(file=write(tmp_path / "parts.csv", header, rows), target="state"))
    read = read_rows(tmp_path / "parts.csv", data.spec.features or (), drop=["state"])
    trained_on = {
        tuple(row) for split in (data.train, data.validation, data.certification, data.test) for row in split.x.tolist()
    }
    assert {tuple(row) for row in read.tolist()} == trained_on


def test_missing_and_unknown_columns_are_named(server: Server, tmp_path: Path) -> None:
    file = write(tmp_path / "parts.csv", ["width", "tall", "state"], [[1, 2, 3]])
    done = ask(file)
    assert done.exit_code == 1
    assert "it lacks 'height', 'depth'; the model does not know 'tall', 'state', to be left out with --drop" in done.output
    assert server.asked == []
    file = write(tmp_path / "more.csv", ["state", *FEATURES], [["fine", 1, 2, 0]])
    assert ask(file, "--drop", "state").exit_code == 0
    assert "has no column 'stat' to drop" in ask(file, "--drop", "stat").output


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (FEATURES, [1, "two", 3], "column 'height', row 2: expected a number, got 'two' (string)"),
        (FEATURES, [1, "", 3], "column 'height', row 2: expected a number, got no value"),
        (FEATURES, [1, "inf", 3], "column 'height', row 2: expected a finite number, got inf"),
        ([*FEATURES, "width"], [1, 2, 3, 4], "has several columns 'width'"),
        (["\udcff", *FEATURES], [1, 2, 3, 4], "parts.csv: 'utf-8' codec can't decode"),
    ],
)
def test_what_cannot_be_asked_about_is_named(tmp_path: Path, header: list[str], row: list[object], message: str) -> None:
    first = [5] * len(header)
    lines = "\n".join(",".join(map(str, line)) for line in (header, first, row))
    (tmp_path / "parts.csv").write_bytes(lines.encode(errors="surrogateescape"))
    with pytest.raises(TableError) as caught:
        read_rows(tmp_path / "parts.csv", FEATURES)
    assert message in str(caught.value)


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="expected at least one row"):
        read_rows(write(tmp_path / "parts.csv", FEATURES, []), FEATURES)


def test_a_model_without_columns_takes_no_table(server: Server, tmp_path: Path) -> None:
    server.features = None
    assert "model parts was not trained on a table" in ask(reordered(tmp_path / "parts.csv")).output


def test_rows_of_a_long_table_go_in_several_requests(server: Server, tmp_path: Path) -> None:
    file = write(tmp_path / "parts.csv", FEATURES, ROWS * 40)
    done = ask(file, "--json")
    assert server.asked == [64, 64, 32]
    assert [json.loads(line)["row"] for line in done.stdout.splitlines()] == list(range(1, 161))
    assert "3 requests: " in ask(file).output


def test_what_was_answered_before_an_error_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bug found: of a long table nothing was, however late the error came."""
    server = Server(FEATURES)

    def fail_in_the_end(request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and len(server.asked) == 2:
            return httpx.Response(500, json={"error": "broken", "code": "internal"})
        return server(request)

    monkeypatch.setattr(command, "Client", partial(Client, transport=httpx.MockTransport(fail_in_the_end)))
    done = ask(write(tmp_path / "parts.csv", FEATURES, ROWS * 40))
    assert done.exit_code == 1
    assert "broken" in done.output
    assert "parts.csv:128" in done.output
    assert "parts.csv:129" not in done.output


def test_probabilities_are_shown_and_printed(server: Server, tmp_path: Path) -> None:
    file = reordered(tmp_path / "parts.csv")
    first = json.loads(ask(file, "--json", "--probabilities").stdout.splitlines()[0])
    assert first["probabilities"] == {"width": 0.5, "height": 0.25, "depth": 0.25}
    assert "width 0.500" in ask(file, "--probabilities").output


def test_json_of_a_stream_is_a_line_for_each_rung(server: Server, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"a picture")
    done = ask(tmp_path / "a.png", tmp_path / "b.png", "--json", "--stream")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["a.png", "b.png"]
    assert all(line["final"] and line["label"] == "width" and "row" not in line for line in lines)
    assert server.asked == [2]


def test_names_of_files_are_shown_as_they_are(server: Server, tmp_path: Path) -> None:
    """Bug found: rich took brackets in them, and in labels, for its markup, which ended the command or swallowed them."""
    for name in ("a[red].png", "[b].png"):
        (tmp_path / name).write_bytes(b"a picture")
    done = ask(tmp_path / "a[red].png", tmp_path / "[b].png", "--stream")
    assert done.exit_code == 0
    assert done.output.count("a[red].png") == done.output.count("[b].png") == 2
