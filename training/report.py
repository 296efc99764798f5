"""What a comparison of methods found: means over seeds, paired differences to separate networks, Markdown, CSV, plot."""

from __future__ import annotations

import csv
import io
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path as FilePath
from typing import Literal

from training.checkpoint import write_atomically
from training.config import MethodName, RunConfig
from training.plots import plot_comparison

Matched = Literal["work", "epochs", "steps", "tuning"]


@dataclass(frozen=True, slots=True)
class Record:
    """One path of one run: a line of the CSV. `evaluations` are per training image, accuracies 0..1."""

    method: MethodName
    matched: Matched
    seed: int
    lr: float
    epochs: float
    evaluations: float
    path: str
    depth: int
    best_of_depth: bool
    validation_accuracy: float
    test_accuracy: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and its standard error, which one seed does not give."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value a seed."""
        return cls(statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None)


@dataclass(frozen=True, slots=True)
class Row:
    """A method at one budget, on test data. `evaluations` per image are those of all its networks.

    `rates`: the learning rate of each depth's network, or the one of all. `behind`: how far a path is behind the path of
    as many blocks that is best on validation data, on average over all paths.
    """

    method: MethodName
    matched: Matched
    seeds: int
    rates: tuple[float, ...]
    epochs: float
    evaluations: float
    by_depth: dict[int, Estimate]
    all_paths: Estimate
    behind: Estimate


@dataclass(frozen=True, slots=True)
class Difference:
    """A family at equal work less separate networks, seed by seed; `average` is over the depths that both have."""

    method: MethodName
    matched: Matched
    by_depth: dict[int, Estimate]
    average: Estimate


def summarise(records: Iterable[Record]) -> list[Row]:
    """Means over seeds by method and budget, in the order of their first records; tuning runs are left out."""
    groups: dict[tuple[MethodName, Matched], list[Record]] = {}
    for record in records:
        if record.matched != "tuning":
            groups.setdefault((record.method, record.matched), []).append(record)
    return [_row(method, matched, members) for (method, matched), members in groups.items()]


def of_columns(sizes: Sequence[int], records: Iterable[Record]) -> list[Record]:
    """The validation-best path of each depth that has a column; of each depth where a method trains none of these."""
    best = [record for record in records if record.best_of_depth]
    return [record for record in best if record.depth in sizes] or best


def differences(records: Iterable[Record]) -> list[Difference]:
    """Every family at equal work against separate networks at equal work and at equal steps, over the seeds of both."""
    best: dict[tuple[MethodName, Matched], dict[int, dict[int, float]]] = {}  # ... -> seed -> depth -> test accuracy
    for record in records:
        if record.best_of_depth:
            of_seed = best.setdefault((record.method, record.matched), {}).setdefault(record.seed, {})
            of_seed[record.depth] = record.test_accuracy
    found = []
    for (method, budget), family in best.items():
        for matched in ("work", "steps"):
            networks = best.get(("bp", matched), {})
            seeds = sorted(family.keys() & networks.keys())
            if method == "bp" or budget != "work" or not seeds:
                continue
            depths = sorted(set.intersection(*(family[seed].keys() & networks[seed].keys() for seed in seeds)))
            if not depths:
                continue
            pairs = {depth: [family[seed][depth] - networks[seed][depth] for seed in seeds] for depth in depths}
            averages = [statistics.mean(of_seed) for of_seed in zip(*pairs.values(), strict=True)]
            by_depth = {depth: Estimate.of(values) for depth, values in pairs.items()}
            found.append(Difference(method, matched, by_depth, Estimate.of(averages)))
    return found


def write_report(
    base: RunConfig, sizes: Sequence[int], seeds: Sequence[int], records: Sequence[Record], out: FilePath
) -> str:
    """Write `comparison.csv`, `comparison.md` and `comparison.png` under `out` and return the Markdown.

    Args:
        base: the configuration of which the runs are variations.
        sizes: the depths that have a column.
        seeds: of the comparison; those of which a method has no run diverged.
        records: of all runs, tuning included.
        out: the folder.

    Raises:
        ValueError: there are no records, because every run diverged.
    """
    rows = summarise(records)
    if not rows:
        raise ValueError("every run diverged: there is nothing to report")
    text = markdown(base, sizes, seeds, records)
    write_atomically(out / "comparison.csv", _csv(records).encode())
    write_atomically(out / "comparison.md", text.encode())
    plot_comparison(_panels(rows), f"{base.name}: the validation-best path of each depth", out / "comparison.png")
    return text


def markdown(base: RunConfig, sizes: Sequence[int], seeds: Sequence[int], records: Sequence[Record]) -> str:
    """The tables of the comparison, with what one must know to read them."""
    rows = summarise(records)
    tuning = [record for record in records if record.matched == "tuning"]
    sections = [
        f"# {base.name}: methods compared",
        _note(base, seeds, rows, tuned=bool(tuning)),
        _accuracies(sizes, len(seeds), rows),
    ]
    if found := differences(records):
        sections += [
            "## Families less separate networks",
            _wrap(
                "Points of test accuracy, a family at equal work less separate networks of as many blocks, paired by "
                "seed: mean ± standard error."
            ),
            _difference_table(sizes, found),
        ]
    if tuning:
        tuning_seeds = sorted({record.seed for record in tuning})
        sections += [
            "## Learning rates",
            _wrap(
                f"Validation accuracy in % at equal work, seed{'s' * (len(tuning_seeds) > 1)} "
                f"{', '.join(map(str, tuning_seeds))}, the mean over the columns' depths; the best is taken. "
                "No entry: diverged."
            ),
            _tuning_table(sizes, tuning),
        ]
    return "\n\n".join(sections) + "\n"


def _note(base: RunConfig, seeds: Sequence[int], rows: Sequence[Row], *, tuned: bool) -> str:
    settings = base.train
    rate = (
        "the learning rate chosen on validation data for each"
        if tuned
        else (f"peak learning rate {settings.lr:g} for every method, which need not be the best for each")
    )
    note = (
        "Test accuracy in % of the path of each depth that is best on validation data, and the mean over all paths that "
        f"the method trains: mean over the seeds {', '.join(map(str, seeds))} ± standard error of the mean. Model "
        f"{base.model.kind}, batch {settings.batch}, {rate}. `evaluations`: block evaluations per training image, of all "
        "networks of a row together. `behind`: points that a path is behind the validation-best path of as many blocks, "
        "mean over all paths. A seed that is missing diverged."
    )
    if any(row.matched == "steps" for row in rows):
        first = next(row.method for row in rows if row.method != "bp")
        note += f" Separate networks matched by steps take as many as `{first}` at equal work."
    return _wrap(note)


def _accuracies(sizes: Sequence[int], seeds: int, rows: Sequence[Row]) -> str:
    header = ["method", "matched by", "seeds", "rate", "epochs", "evaluations", *_columns(sizes), "all paths", "behind"]
    lines = [_line(header), _line(["---", "---", *["--:"] * (len(header) - 2)])]
    for row in rows:
        cells = [_cell(row.by_depth.get(depth)) for depth in sizes]
        name = "`bp`, separate networks" if row.method == "bp" else f"`{row.method}`"
        seeds_of = f"{row.seeds} of {seeds}" if row.seeds < seeds else str(row.seeds)
        paths = ["", ""] if row.method == "bp" else [_cell(row.all_paths), _cell(row.behind)]
        rates = " / ".join(f"{rate:g}" for rate in row.rates)
        lines.append(
            _line([name, row.matched, seeds_of, rates, f"{row.epochs:.1f}", f"{row.evaluations:.0f}", *cells, *paths])
        )
    return "\n".join(lines)


def _difference_table(sizes: Sequence[int], found: Sequence[Difference]) -> str:
    header = ["method", "separate networks matched by", *_columns(sizes), "average"]
    lines = [_line(header), _line(["---", "---", *["--:"] * (len(header) - 2)])]
    for each in found:
        cells = [_cell(each.by_depth.get(depth), signed=True) for depth in sizes]
        lines.append(_line([f"`{each.method}`", each.matched, *cells, _cell(each.average, signed=True)]))
    return "\n".join(lines)


def _tuning_table(sizes: Sequence[int], tuning: Sequence[Record]) -> str:
    rates = sorted({record.lr for record in tuning})
    found: dict[str, dict[float, list[float]]] = {}
    for method in dict.fromkeys(record.method for record in tuning):
        for record in of_columns(sizes, (record for record in tuning if record.method == method)):
            name = f"`bp`, {record.depth} block{'s' * (record.depth > 1)}" if method == "bp" else f"`{method}`"
            found.setdefault(name, {}).setdefault(record.lr, []).append(record.validation_accuracy)
    lines = [_line(["method", *(f"{rate:g}" for rate in rates)]), _line(["---", *["--:"] * len(rates)])]
    for name, by_rate in found.items():
        lines.append(
            _line([name, *(f"{100 * statistics.mean(by_rate[rate]):.1f}" if rate in by_rate else "" for rate in rates)])
        )
    return "\n".join(lines)


def _row(method: MethodName, matched: Matched, records: Sequence[Record]) -> Row:
    by_seed: dict[int, list[Record]] = {}
    for record in records:
        by_seed.setdefault(record.seed, []).append(record)
    best = [record for record in records if record.best_of_depth]
    networks = {record.depth: record.evaluations for record in records}  # for bp, which has a network of each depth
    rates = {record.depth: record.lr for record in records}
    return Row(
        method,
        matched,
        len(by_seed),
        tuple(rates[depth] for depth in sorted(rates)) if len(set(rates.values())) > 1 else (records[0].lr,),
        records[0].epochs,
        sum(networks.values()) if method == "bp" else records[0].evaluations,
        {
            depth: Estimate.of([record.test_accuracy for record in best if record.depth == depth])
            for depth in sorted({record.depth for record in best})
        },
        Estimate.of([statistics.mean(record.test_accuracy for record in members) for members in by_seed.values()]),
        Estimate.of([_behind(members) for members in by_seed.values()]),
    )


def _behind(records: Sequence[Record]) -> float:
    best = {record.depth: record.test_accuracy for record in records if record.best_of_depth}
    return statistics.mean(best[record.depth] - record.test_accuracy for record in records)


def _panels(rows: Sequence[Row]) -> dict[str, dict[str, dict[int, tuple[float, float]]]]:
    """What is drawn: panel -> label -> depth -> (mean, standard error). Separate networks of E epochs are in both."""
    panels: dict[str, dict[str, dict[int, tuple[float, float]]]] = {"equal work": {}, "equal epochs": {}}
    for row in rows:
        curve = {depth: (estimate.mean, estimate.error or 0.0) for depth, estimate in row.by_depth.items()}
        if row.matched == "steps":
            panels["equal work"]["bp, equal steps"] = curve
        elif row.method == "bp":
            panels["equal work"]["bp, together"] = panels["equal epochs"]["bp"] = curve
        else:
            panels[f"equal {row.matched}"][row.method] = curve
    return panels


def _csv(records: Sequence[Record]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Record)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, records))
    return text.getvalue()


def _columns(sizes: Sequence[int]) -> list[str]:
    return [f"{depth} block{'s' * (depth > 1)}" for depth in sizes]


def _cell(estimate: Estimate | None, *, signed: bool = False) -> str:
    if estimate is None:
        return ""
    mean = f"{100 * estimate.mean:{'+' if signed else ''}.1f}"
    return mean if estimate.error is None else f"{mean} ± {100 * estimate.error:.1f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _wrap(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)
