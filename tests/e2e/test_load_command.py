"""`hbll load` against a real server."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from benchmarks.load import Outcome
from benchmarks.service_level import in_time
from benchmarks.traces import poisson
from hbll.cli import main
from tests.conftest import LiveServer
from training.dataset import Dataset


@pytest.fixture(scope="module")
def picture(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("load") / "digit.png"
    Image.fromarray((digits.test.x[0].numpy() * 255).round().astype("uint8")).save(file)
    return file


def load(picture: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["load", str(picture), *map(str, arguments)])


def requests(server: LiveServer) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("hbll_requests_total{"))


def rows(result: Result) -> list[list[str]]:
    """The cells of the table, those that go on in a next line put together."""
    found: list[list[str]] = []
    for line in result.output.splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if cells[0]:
                found.append(cells)
            else:
                found[-1] = [f"{before} {more}".strip() for before, more in zip(found[-1], cells, strict=True)]
    return found


def test_every_request_is_sent_and_described(server: LiveServer, picture: Path) -> None:
    before = requests(server)
    done = load(picture, "--url", server.url, "--rates", "30,60", "--seconds", 1, "--budget-ms", 20_000, "--at-least", 100)
    assert done.exit_code == 0, done.output
    assert requests(server) - before == 50 + len(poisson(30, 1, 0)) + len(poisson(60, 1, 0))
    assert [row[:3] for row in rows(done)] == [["30", "100.0", "0.0"], ["60", "100.0", "0.0"]]
    assert all(float(row[3]) >= 1 and float(row[4]) <= float(row[5]) and row[7] == "" for row in rows(done))


def test_a_service_level_that_is_missed_fails(server: LiveServer, picture: Path) -> None:
    """With a budget that nobody can keep; the way there is more than that."""
    missed = load(picture, "--url", server.url, "--rates", "40", "--seconds", 1, "--budget-ms", 0.05, "--at-least", 50)
    assert missed.exit_code == 1, missed.output
    ((_, share, late, *_, others),) = rows(missed)
    assert float(share) < 50
    assert float(late) > 0 or others


def test_what_the_server_refuses_is_told_before_any_load(server: LiveServer, picture: Path) -> None:
    wrong = load(picture, "--url", server.url, "--rates", "40", "--budget-ms", 50, "--path", "4-5")
    assert wrong.exit_code == 1
    assert "path" in wrong.output
    assert not rows(wrong)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rates", "10,x"], "expected numbers above 0"),
        (["--rates", "0"], "expected numbers above 0"),
        (["--rates", "10", "--url", "https://localhost:1"], "expected http://HOST:PORT"),
        (["--rates", "10", "--url", "http://localhost:1"], "Is a server running there?"),
        (["--rates", "10", "--drop", "state"], "--drop goes with tables"),
    ],
)
def test_what_cannot_be_is_said(server: LiveServer, picture: Path, arguments: list[str], said: str) -> None:
    failed = load(picture, "--budget-ms", 50, "--url", server.url, *arguments)
    assert failed.exit_code != 0
    assert said in failed.output


def test_what_is_not_answered_is_not_in_time() -> None:
    """However quick: a refusal, an answer that is late, none at all."""
    outcomes = [
        Outcome(1.0, 1.0, 1.05, 200, b"", None),
        Outcome(1.0, 1.0, 1.01, 504, b"", None),
        Outcome(1.0, 1.9, 2.0, 200, b"", None),  # from when it should have been sent
        Outcome(1.0, 1.0, 1.01, None, None, "lost"),
    ]
    assert in_time(outcomes, 0.1) == 0.25
