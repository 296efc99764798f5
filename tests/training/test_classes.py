from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from training import assessment_report
from training.assessment import read_metrics
from training.classes import classes_csv, score_classes
from training.config import MlpConfig, RunConfig, TrainConfig
from training.data_config import ArraysConfig
from training.sources import load_data
from training.trainer import train


def test_a_rare_class_counts_as_much_as_others_in_balanced_accuracy() -> None:
    labels = np.array([0] * 8 + [1] * 2)
    answer = np.array([0] * 9 + [1])
    scores = score_classes(answer, labels, 2)
    assert scores.rows.tolist() == [8, 2]
    assert scores.recall.tolist() == [1, 0.5]
    assert scores.precision == pytest.approx([8 / 9, 1])
    assert scores.balanced_accuracy == 0.75  # and the accuracy is 0.9


def test_a_class_without_rows_or_answers_has_no_share_and_no_part_in_balanced_accuracy() -> None:
    scores = score_classes(np.array([0, 0, 2]), np.array([0, 1, 0]), 3)
    assert np.isnan(scores.recall).tolist() == [False, False, True]
    assert np.isnan(scores.precision).tolist() == [False, True, False]
    assert scores.balanced_accuracy == 0.25
    assert classes_csv({(1, 2): scores}, ["a", "b, c", "d"]).splitlines() == [
        "path,depth,class,rows,recall,precision",
        "1-2,2,a,2,0.5,0.5",
        '1-2,2,"b, c",1,0,',
        "1-2,2,d,0,,0",
    ]


def test_of_many_classes_the_ten_worst_are_shown_and_all_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(assessment_report, "console", terminal)
    names = np.array([f"[red]{number:02}" for number in range(12)])  # no markup
    x = np.repeat(4 * np.eye(12)[:, :10], 20, axis=0) + np.random.default_rng(0).standard_normal((240, 10))
    np.savez(tmp_path / "x.npz", x=x, y=np.repeat(names, 20))
    data = load_data(ArraysConfig(file=tmp_path / "x.npz"))
    run = RunConfig(model=MlpConfig(hierarchy_depth=2, width=8), train=TrainConfig(budget=20, evaluations=1, batch=32))
    family = train(run, tmp_path / "run", data, lambda _: None)
    assessment_report.report(run, family, data, tmp_path / "run")

    rows = list(csv.DictReader((tmp_path / "run" / "classes.csv").read_text().splitlines()))
    metrics = read_metrics(tmp_path / "run")
    of_ladder = {"2", "2-3"}
    assert {row["path"] for row in rows} - of_ladder in (set(), {"1-2"}, {"1-2-3"})  # one more if it is the reference path
    for path in of_ladder:
        recalls = [float(row["recall"]) for row in rows if row["path"] == path]
        assert [row["class"] for row in rows if row["path"] == path] == names.tolist()
        assert metrics[tuple(map(int, path.split("-")))].test.balanced_accuracy == pytest.approx(np.mean(recalls), abs=1e-5)

    printed = terminal.file.getvalue()  # type: ignore[attr-defined]
    table = printed[printed.index("the 10 worst of 12 classes") :]
    recall = {row["class"]: float(row["recall"]) for row in rows if row["path"] == _reference(table)}
    shown = [name for name in table.split() if name in recall]
    assert shown == sorted(recall, key=lambda name: (recall[name], names.tolist().index(name)))[:10]


def _reference(table: str) -> str:
    words = table.split()
    return words[words.index("(ref.)") - 1]
