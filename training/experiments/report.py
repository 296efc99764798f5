"""The report of an experiment: its table as Markdown, every figure as CSV, a picture; the paper's figures beside ours."""

from __future__ import annotations

import csv
import io
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.checkpoint import write_atomically
from training.experiments.experiment import Experiment, Result
from training.plots import plot_rows

NOT_THE_PAPERS_DATA = "**Not the paper's data.**"


@dataclass(frozen=True, slots=True)
class Figure:
    """A cell of the table: the mean over `runs` trials with its standard error, which one trial does not give."""

    mean: float
    error: float | None
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """From one value a trial."""
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return cls(statistics.mean(values), error, len(values))


def figures(results: Iterable[Result]) -> dict[tuple[str, str], Figure]:
    """The table's cells by (row, column), in the order in which they were first measured."""
    values: dict[tuple[str, str], list[float]] = {}
    for result in results:
        for cell in result.cells:
            values.setdefault((cell.row, cell.column), []).append(cell.value)
    return {where: Figure.of(found) for where, found in values.items()}


def write_report(
    experiment: Experiment, results: Sequence[Result], diverged: Sequence[str], command: str, out: Path
) -> str:
    """Write `<name>.md`, `.csv` and `.png` under `out` and return the Markdown.

    Not all trials need have ended: the report says how many have. `diverged` are the names of those without a result.
    """
    text = markdown(experiment, results, diverged, command)
    write_atomically(out / f"{experiment.name}.csv", _csv(experiment, results).encode())
    write_atomically(out / f"{experiment.name}.md", text.encode())
    ours = {where: (figure.mean, figure.error or 0.0) for where, figure in figures(results).items()}
    rows, columns = _rows_and_columns(experiment, results)
    title = f"{experiment.name}, scale {experiment.scale}" + (" (not the paper's data)" if experiment.stand_in else "")
    paper = {} if experiment.published_quantity else experiment.published  # one axis has one unit
    shown, least = experiment.plotted or columns, experiment.plotted_from
    plot_rows(rows, shown, ours, paper, title, experiment.quantity, out / f"{experiment.name}.png", least)
    return text


def markdown(experiment: Experiment, results: Sequence[Result], diverged: Sequence[str], command: str) -> str:
    """The table with what one must know to read it: rows that only we have first, then the paper's in its order."""
    ours, paper = figures(results), experiment.published
    rows, columns = _rows_and_columns(experiment, results)
    measured, published = {column for _, column in ours}, {column for _, column in paper}
    unit = f" ({experiment.published_quantity})" if experiment.published_quantity else ""
    header, sides = [""], ["---"]
    for column in columns:
        header += [column] * (column in measured) + [f"{column}, paper{unit}"] * (column in published)
    sides += ["--:"] * (len(header) - 1)
    lines = [_line(header), _line(sides)]
    for row in rows:
        cells = [row]
        for column in columns:
            if column in measured:
                cells.append(_ours(ours.get((row, column)), experiment.decimals))
            if column in published:
                cells.append(f"{paper[row, column]:g}" if (row, column) in paper else "")
        lines.append(_line(cells))
    cores = sum(result.core_seconds for result in results) / 60
    minutes = sum(result.seconds for result in results) / 60
    counts = sorted({figure.runs for figure in ours.values()})
    stand_in = f"{NOT_THE_PAPERS_DATA} " if experiment.stand_in else ""
    facts = [
        f"{stand_in}Data: {experiment.data}",
        f"Figures: {experiment.quantity}. Ours are means over {' or '.join(map(str, counts))} run(s) ± standard error; an "
        "empty cell was not run, or the paper has no such figure.",
        f"{len(results)} of {len(experiment.trials)} runs: {cores:.1f} core-minutes of CPU time together ({minutes:.1f} "
        "minutes of wall time, to which other work on the machine adds).",
        *experiment.notes,
        *(["Diverged and left out: " + ", ".join(diverged)] if diverged else []),
    ]
    notes = [
        textwrap.fill(fact, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False) for fact in facts
    ]
    title = f"# {experiment.name}, scale {experiment.scale}: {experiment.title}"
    return "\n".join([title, "", *lines, "", *notes, "", f"    {command}", ""])


def _rows_and_columns(experiment: Experiment, results: Sequence[Result]) -> tuple[list[str], list[str]]:
    ours, paper = figures(results), experiment.published
    papers_rows = dict.fromkeys(row for row, _ in paper)
    rows = [*dict.fromkeys(row for row, _ in ours if row not in papers_rows), *papers_rows]
    return rows, list(dict.fromkeys(column for _, column in (*ours, *paper)))


def _csv(experiment: Experiment, results: Sequence[Result]) -> str:
    """A line for every figure of every trial, and one for each of the paper's (`trial` is then `paper`)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["experiment", "scale", "trial", "row", "column", "value"])
    for result in results:
        for cell in result.cells:
            writer.writerow([experiment.name, experiment.scale, result.trial, cell.row, cell.column, f"{cell.value:.6g}"])
    for (row, column), value in experiment.published.items():
        writer.writerow([experiment.name, "paper", "paper", row, column, value])
    return text.getvalue()


def _ours(figure: Figure | None, decimals: int) -> str:
    if figure is None:
        return ""
    mean = f"{figure.mean:.{decimals}f}"
    return mean if figure.error is None else f"{mean} ± {figure.error:.{decimals}f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
