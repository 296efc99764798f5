"""The comparison of methods: which runs it needs, running them, and the report of them all.

Every family gets two budgets, and so do separate networks of 1..D and of N-1 blocks, which are trained by ordinary
backpropagation. With B block evaluations per training image as the budget, and E = B / (the sum of those blocks):

- equal *work*: a family spends B; the separate networks spend B together, which is E epochs each.
- equal *epochs*: a family passes E times over the training images, as each of the separate networks does.
- equal *steps*: each of the separate networks takes as many optimizer steps as the first family of the list at equal
  work. The networks together then cost more than B.

A run that is finished is not run again, and one that was killed goes on, so a comparison can be stopped, or shared among
processes by seeds, and reported when all is there.
"""

from __future__ import annotations

import csv
import io
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path as FilePath
from typing import Literal

from family.tree import Path, Tree, format_path
from training.checkpoint import CheckpointError, load_run_config, write_atomically
from training.config import MethodName, RunConfig, parse_config
from training.dataset import Dataset
from training.evaluate import METRICS_FILE, PathMetrics, measure, read_metrics, write_metrics
from training.methods import METHODS, steps_of, trained_paths
from training.plots import plot_comparison
from training.trainer import Report, train

Matched = Literal["work", "epochs", "steps"]


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the comparison, and what its budget is matched by."""

    matched: Matched
    config: RunConfig

    @property
    def name(self) -> str:
        """Of the run's folder: `chains-work-seed0`, `bp3-steps-seed1`."""
        settings = self.config.train
        return f"{settings.method}{settings.blocks or ''}-{self.matched}-seed{settings.seed}"


@dataclass(frozen=True, slots=True)
class Record:
    """One path of one run: a line of the CSV. `evaluations` are per training image, accuracies 0..1."""

    method: MethodName
    matched: Matched
    seed: int
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
    """A method at one budget. `evaluations` per image are those of all its networks; accuracies are on test data."""

    method: MethodName
    matched: Matched
    seeds: int
    epochs: float
    evaluations: float
    by_depth: dict[int, Estimate]
    all_paths: Estimate


def separate_blocks(tree: Tree) -> tuple[int, ...]:
    """The sizes of the separate networks: those of the ladder's rungs, and all blocks."""
    return tuple(sorted({*range(1, tree.hierarchy_depth + 1), len(tree.nodes)}))


def plan(base: RunConfig, methods: Sequence[MethodName], seeds: Sequence[int], images: int) -> list[Job]:
    """All runs, seed by seed; only `base`'s method, blocks, seed and budget are replaced.

    Raises:
        ConfigError: a method or seed cannot be.
    """
    tree = Tree(base.model.hierarchy_depth)
    sizes = separate_blocks(tree)
    epochs = base.train.budget / sum(sizes)
    families = [method for method in methods if method != "bp"]
    jobs = []
    for seed in seeds:
        at_work = [_changed(base, method, seed, base.train.budget) for method in families]
        for config in at_work:
            jobs.append(Job("work", config))
            jobs.append(Job("epochs", _changed(base, config.train.method, seed, epochs * _evaluations(config))))
        if "bp" in methods:
            jobs += [Job("work", _changed(base, "bp", seed, epochs * blocks, blocks)) for blocks in sizes]
        if "bp" in methods and at_work:
            longer = steps_of(at_work[0], tree, images) * base.train.batch / images
            jobs += [Job("steps", _changed(base, "bp", seed, longer * blocks, blocks)) for blocks in sizes]
    return jobs


def run(job: Job, out: FilePath, data: Dataset, on_step: Callable[[Report], None]) -> list[Record]:
    """Train and measure one run in its folder under `out`, or read it if it is there already.

    Raises:
        ConfigError: the folder holds a run of another configuration.
        CheckpointError: what it holds is damaged.
        TrainingDiverged: the loss is not finite.
    """
    folder = out / "runs" / job.name
    if _is_finished(folder, job.config):
        return _records(job, read_metrics(folder))
    family = train(job.config, folder, data, on_step, resume=True)
    metrics = measure(family, data, trained_paths(job.config, family.tree, tuple(family.tree.paths())))
    write_metrics(folder, metrics)
    return _records(job, metrics)


def summarise(records: Iterable[Record]) -> list[Row]:
    """Means over seeds by method and budget, in the order of their first records."""
    groups: dict[tuple[MethodName, Matched], list[Record]] = {}
    for record in records:
        groups.setdefault((record.method, record.matched), []).append(record)
    return [_row(method, matched, members) for (method, matched), members in groups.items()]


def write_report(base: RunConfig, jobs: Sequence[Job], records: Sequence[Record], out: FilePath) -> str:
    """Write `comparison.csv`, `comparison.md` and `comparison.png` under `out` and return the Markdown.

    Raises:
        ValueError: there are no records, because every run diverged.
    """
    if not records:
        raise ValueError("every run diverged: there is nothing to report")
    rows = summarise(records)
    text = markdown(base, jobs, rows)
    write_atomically(out / "comparison.csv", _csv(records).encode())
    write_atomically(out / "comparison.md", text.encode())
    plot_comparison(_panels(rows), f"{base.name}: the validation-best path of each depth", out / "comparison.png")
    return text


def markdown(base: RunConfig, jobs: Sequence[Job], rows: Sequence[Row]) -> str:
    """The table of the comparison, with what one must know to read it."""
    seeds = sorted({job.config.train.seed for job in jobs})
    sizes = separate_blocks(Tree(base.model.hierarchy_depth))
    columns = [f"{depth} block{'s' * (depth > 1)}" for depth in sizes]
    header = ["method", "matched by", "seeds", "epochs", "evaluations", *columns, "all paths"]
    lines = [_line(header), _line(["---", "---", *["--:"] * (len(header) - 2)])]
    for row in rows:
        cells = [_cell(row.by_depth.get(depth)) for depth in sizes]
        name = "`bp`, separate networks" if row.method == "bp" else f"`{row.method}`"
        seeds_of = f"{row.seeds} of {len(seeds)}" if row.seeds < len(seeds) else str(row.seeds)
        all_paths = "" if row.method == "bp" else _cell(row.all_paths)
        lines.append(_line([name, row.matched, seeds_of, f"{row.epochs:.1f}", f"{row.evaluations:.0f}", *cells, all_paths]))
    settings = base.train
    note = (
        "Test accuracy in % of the path of each depth that is best on validation data, and the mean over all paths that "
        f"the method trains: mean over the seeds {', '.join(map(str, seeds))} ± standard error of the mean. Model "
        f"{base.model.kind}, batch {settings.batch}, peak learning rate {settings.lr:g} for every method, which need not "
        "be the best for each. `evaluations`: block evaluations per training image, of all networks of a row together. A "
        "seed that is missing diverged."
    )
    if any(row.matched == "steps" for row in rows):
        first = next(job.config.train.method for job in jobs if job.config.train.method != "bp")
        note += f" Separate networks matched by steps take as many as `{first}` at equal work."
    return "\n".join([f"# {base.name}: methods compared", "", textwrap.fill(note, 120), "", *lines, ""])


def _changed(base: RunConfig, method: MethodName, seed: int, budget: float, blocks: int | None = None) -> RunConfig:
    settings = base.train.model_dump() | {"method": method, "seed": seed, "budget": budget, "blocks": blocks}
    return parse_config(base.model_dump() | {"train": settings}, "the comparison")


def _evaluations(config: RunConfig) -> float:
    """Of one image in one epoch."""
    return METHODS[config.train.method].evaluations(config.train, Tree(config.model.hierarchy_depth))


def _is_finished(folder: FilePath, config: RunConfig) -> bool:
    """Metrics are written last. A folder of another configuration is not: the trainer refuses it by name."""
    try:
        return (folder / METRICS_FILE).exists() and load_run_config(folder) == config
    except CheckpointError:
        return False


def _records(job: Job, metrics: Mapping[Path, PathMetrics]) -> list[Record]:
    settings = job.config.train
    epochs = settings.budget / _evaluations(job.config)
    return [
        Record(
            settings.method,
            job.matched,
            settings.seed,
            epochs,
            settings.budget,
            format_path(path),
            result.depth,
            result.best_of_depth,
            result.validation.accuracy,
            result.test.accuracy,
        )
        for path, result in metrics.items()
    ]


def _row(method: MethodName, matched: Matched, records: Sequence[Record]) -> Row:
    by_seed: dict[int, list[Record]] = {}
    for record in records:
        by_seed.setdefault(record.seed, []).append(record)
    best = [record for record in records if record.best_of_depth]
    networks = {record.depth: record.evaluations for record in records}  # for bp, which has a network of each depth
    return Row(
        method,
        matched,
        len(by_seed),
        records[0].epochs,
        sum(networks.values()) if method == "bp" else records[0].evaluations,
        {
            depth: Estimate.of([record.test_accuracy for record in best if record.depth == depth])
            for depth in sorted({record.depth for record in best})
        },
        Estimate.of([statistics.mean(record.test_accuracy for record in members) for members in by_seed.values()]),
    )


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


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    mean = f"{100 * estimate.mean:.1f}"
    return mean if estimate.error is None else f"{mean} ± {100 * estimate.error:.1f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
