from __future__ import annotations

import pytest
from pydantic import ValidationError

from service.settings import ModelSettings, Settings
from service.version_policy import Versions, choose


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [("latest", [10]), (1, [10]), (2, [10, 2]), (9, [10, 2, 1]), ("all", [10, 2, 1]), ((2, 7, 1), [2, 1]), ((7,), [])],
)
def test_versions_are_chosen_by_number_and_told_highest_first(versions: Versions, chosen: list[int]) -> None:
    assert choose(versions, [2, 10, 1]) == chosen
    assert choose(versions, []) == []


@pytest.mark.parametrize(("text", "versions"), [("latest", "latest"), ("all", "all"), ("3", 3), ("[1, 3]", (1, 3))])
def test_the_environment_can_say_each(monkeypatch: pytest.MonkeyPatch, text: str, versions: Versions) -> None:
    monkeypatch.setenv("HBLL_VERSIONS", text)
    assert Settings().versions == versions
    assert Settings(per_model={"a": {"versions": [4]}}).of_model("a").versions == (4,)
    assert Settings(per_model={"a": {"versions": [4]}}).of_model("b").versions == versions


@pytest.mark.parametrize("wrong", ["newest", 0, -1, 1.5, True, [], [0], ["1"], [[1]], None, {"latest": 1}])
def test_what_chooses_no_versions_is_refused_and_says_what_would(wrong: object) -> None:
    with pytest.raises(
        ValidationError, match="expected latest, all, how many of the highest versions, or a list of versio"
    ):
        ModelSettings(versions=wrong)  # type: ignore[arg-type]
