"""The comparison of methods: which runs it needs, how their learning rates are chosen, and running them.

Every family gets two budgets, and so do separate networks of 1..D and of N-1 blocks, which are trained by ordinary
backpropagation. With B block evaluations per training image as the budget, and E = B / (the sum of those blocks):

- equal *work*: a family spends B; the separate networks spend B together, which is E epochs each.
- equal *epochs*: a family passes E times over the training images, as each of the separate networks does.
- equal *steps*: each of the separate networks takes as many optimizer steps as the first family of the list at equal
  work. The networks together then cost more than B.

Learning rates can be chosen for every method, and for every separate network, by *tuning* runs at equal work with seeds
of their own, on validation data.

A run that is finished, or has diverged, is not run again, and one that was killed goes on, so a comparison can be stopped,
or shared among processes by seeds, and reported when all is there. One that another process is at, as with the tuning runs
that all of them want, is waited for. What came out is told by `training.report`.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Literal

from family.tree import Path, Tree, format_path
from training.assessment import METRICS_FILE, PathMetrics, assess, read_metrics, write_metrics
from training.checkpoint import CONFIG_FILE, CheckpointError, load_run_config, write_atomically
from training.config import ConfigError, MethodName, RunConfig, describe_changes, parse_config
from training.dataset import Dataset
from training.methods import method_of, steps_of, trained_paths
from training.model import Factory, build_family
from training.report import Matched, Record, of_columns
from training.trainer import LOG_FILE, History, Report, TrainingDiverged, train

DIVERGED_FILE = "diverged.txt"
"""Why a run ended without metrics."""

Rates = Mapping[tuple[MethodName, int | None], float]
"""Peak learning rates by method and, for separate networks, blocks; what is not in it keeps the base's."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the comparison, and what its budget is matched by."""

    matched: Matched
    config: RunConfig

    @property
    def name(self) -> str:
        """Of the run's folder: `chains-work-seed0`, `bp3-steps-seed1`, `chains-lr0.001-seed100` of a tuning run."""
        settings = self.config.train
        kind = f"lr{settings.lr:g}" if self.matched == "tuning" else self.matched
        return f"{settings.method.replace(':', '.')}{settings.blocks or ''}-{kind}-seed{settings.seed}"

    @property
    def trained(self) -> tuple[MethodName, int | None]:
        """The method, and the blocks of a separate network: what has a learning rate of its own."""
        return self.config.train.method, self.config.train.blocks

    @property
    def epochs(self) -> float:
        """Passes over the training images that the budget is enough for."""
        return self.config.train.budget / _evaluations(self.config)


def separate_blocks(tree: Tree) -> tuple[int, ...]:
    """The sizes of the separate networks: those of the ladder's rungs, and all blocks."""
    return tuple(sorted({*range(1, tree.hierarchy_depth + 1), len(tree.nodes)}))


def plan(
    base: RunConfig, methods: Sequence[MethodName], seeds: Sequence[int], images: int, rates: Rates | None = None
) -> list[Job]:
    """All runs, seed by seed; only `base`'s method, blocks, seed, budget and learning rate are replaced.

    Raises:
        ConfigError: a method or seed cannot be, or runs could end before their budgets are spent.
    """
    if base.train.patience is not None:
        raise ConfigError(
            "train.patience lets each run stop when it likes, and a comparison is of runs that do equal work: leave it out"
        )
    tree = Tree(base.model.hierarchy_depth)
    sizes = separate_blocks(tree)
    epochs = base.train.budget / sum(sizes)
    families = [method for method in methods if method != "bp"]
    changed = _Changes(base, rates or {})
    jobs = []
    for seed in seeds:
        at_work = [changed(method, seed, base.train.budget) for method in families]
        for config in at_work:
            jobs.append(Job("work", config))
            jobs.append(Job("epochs", changed(config.train.method, seed, epochs * _evaluations(config))))
        if "bp" in methods:
            jobs += [Job("work", changed("bp", seed, epochs * blocks, blocks)) for blocks in sizes]
        if "bp" in methods and at_work:
            longer = steps_of(at_work[0], tree, images) * base.train.batch / images
            jobs += [Job("steps", changed("bp", seed, longer * blocks, blocks)) for blocks in sizes]
    return jobs


def plan_tuning(
    base: RunConfig, methods: Sequence[MethodName], seeds: Sequence[int], candidates: Sequence[float]
) -> list[Job]:
    """The runs that decide about learning rates: every method, and every separate network, at equal work.

    Raises:
        ConfigError: a method, seed or rate cannot be.
    """
    sizes = separate_blocks(Tree(base.model.hierarchy_depth))
    epochs = base.train.budget / sum(sizes)
    jobs = []
    for method in methods:
        for blocks in sizes if method == "bp" else (None,):
            budget = base.train.budget if blocks is None else epochs * blocks
            for lr in candidates:
                changed = _Changes(base, {(method, blocks): lr})
                jobs += [Job("tuning", changed(method, seed, budget, blocks)) for seed in seeds]
    return jobs


def choose_rates(
    base: RunConfig, results: Iterable[tuple[Job, Sequence[Record]]]
) -> dict[tuple[MethodName, int | None], float]:
    """Of each method and separate network the rate with the best validation accuracy, the mean over the tuning seeds and
    over the reported depths, or over all depths of a method that trains none of these. A rate of which a run diverged, and
    so is missing from `results`, has its other runs only.
    """
    sizes = separate_blocks(Tree(base.model.hierarchy_depth))
    scores: dict[tuple[MethodName, int | None], dict[float, list[float]]] = {}
    for job, records in results:
        reported = [record.validation_accuracy for record in of_columns(sizes, records)]
        scores.setdefault(job.trained, {}).setdefault(job.config.train.lr, []).append(statistics.mean(reported))
    return {
        trained: max(by_rate, key=lambda lr: (statistics.mean(by_rate[lr]), -lr)) for trained, by_rate in scores.items()
    }


def require_unclaimed(jobs: Sequence[Job], out: FilePath, *, rates_known: bool = True) -> None:
    """See that no folder of a run belongs to another configuration, before any run is trained. Learning rates that are
    still to be chosen are not compared.

    Raises:
        ConfigError: one does.
        CheckpointError: one holds a damaged configuration.
    """
    for job in jobs:
        folder = out / "runs" / job.name
        if not (folder / CONFIG_FILE).exists():
            continue
        before, config = load_run_config(folder), job.config
        if not rates_known:
            config = config.model_copy(update={"train": config.train.model_copy(update={"lr": before.train.lr})})
        if before == config:
            continue
        why = "give the settings it was started with, or choose another --out"
        if job.matched == "steps":
            first = next(other.config.train.method for other in jobs if other.config.train.method != "bp")
            why = (
                "separate networks matched by steps take as many as the first family of --methods, which is now "
                f"{first}: name the family first that was first before, or choose another --out"
            )
        raise ConfigError(f"{folder} was started with another configuration, {describe_changes(before, config)}: {why}")


def end_of(job: Job, out: FilePath) -> Literal["finished", "diverged"] | None:
    """How the run ended, if it has: metrics are written last. A folder of another configuration is another run's."""
    folder = out / "runs" / job.name
    try:
        if load_run_config(folder) != job.config:
            return None
    except CheckpointError:
        return None
    if (folder / METRICS_FILE).exists():
        return "finished"
    return "diverged" if (folder / DIVERGED_FILE).exists() else None


def share_trained(job: Job, out: FilePath) -> float:
    """The share of its budget, 0..1, after which the run would go on."""
    rows = History.read(out / "runs" / job.name / LOG_FILE, up_to_step=2**62).rows  # a checkpoint follows each row
    return min(1.0, float(rows[-1]["share"])) if rows else 0.0


def run(
    job: Job, out: FilePath, data: Dataset, on_step: Callable[[Report], None], factory: Factory | None = None
) -> list[Record]:
    """Train and measure one run in its folder under `out`, or read it if it is there already or another process is at it.
    `factory` builds families of `model.kind = "custom"`.

    Raises:
        ConfigError: the folder holds a run of another configuration, or the model is custom and there is no factory.
        CheckpointError: what it holds is damaged.
        TrainingDiverged: the loss is not finite, or was not when the run was trained: from its last checkpoint it would
            come to the same step.
    """
    folder = out / "runs" / job.name
    match end_of(job, out):
        case "finished":
            return _records(job, read_metrics(folder))
        case "diverged":
            before = (folder / DIVERGED_FILE).read_text(encoding="utf-8")
            raise TrainingDiverged(f"{before} (so it ended before; to train it again, remove {folder})")
    family = build_family(job.config.model, job.config.train.seed, data.spec, factory)
    family = copy.deepcopy(family)  # a factory may keep its modules, and no run begins with what another has trained
    try:
        family = train(job.config, folder, data, on_step, family=family, resume=True, wait=True)
    except TrainingDiverged as exc:
        write_atomically(folder / DIVERGED_FILE, str(exc).encode())
        raise
    if end_of(job, out) == "finished":  # by the other process that it waited for
        return _records(job, read_metrics(folder))
    metrics = assess(family, data, trained_paths(job.config, family.tree, tuple(family.tree.paths()))).paths
    write_metrics(folder, metrics)
    return _records(job, metrics)


@dataclass(frozen=True, slots=True)
class _Changes:
    """Makes a run's configuration out of the base's."""

    base: RunConfig
    rates: Rates

    def __call__(self, method: MethodName, seed: int, budget: float, blocks: int | None = None) -> RunConfig:
        settings = self.base.train.model_dump() | {"method": method, "seed": seed, "budget": budget, "blocks": blocks}
        settings["lr"] = self.rates.get((method, blocks), self.base.train.lr)
        return parse_config(self.base.model_dump() | {"train": settings}, "the comparison")


def _evaluations(config: RunConfig) -> float:
    """Of one image in one epoch."""
    return method_of(config.train).evaluations(config.train, Tree(config.model.hierarchy_depth))


def _records(job: Job, metrics: Mapping[Path, PathMetrics]) -> list[Record]:
    settings = job.config.train
    return [
        Record(
            settings.method,
            job.matched,
            settings.seed,
            settings.lr,
            job.epochs,
            settings.budget,
            format_path(path),
            result.depth,
            result.best_of_depth,
            result.validation.accuracy,
            result.test.accuracy,
        )
        for path, result in metrics.items()
    ]
