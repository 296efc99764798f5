"""What an experiment is: trials, each with a folder of its own, that fill the cells of a table.

A trial that is finished is not run again, and one that was killed goes on, so an experiment can be stopped at any time.
What the trials train is theirs; this module knows neither models nor data.
"""

from __future__ import annotations

import multiprocessing
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from training.checkpoint import write_atomically
from training.config import ConfigError
from training.trainer import TrainingDiverged

Scale = Literal["smoke", "small", "paper"]
OnShare = Callable[[float], None]
"""Is told which share of a trial is done, 0..1."""

Read = TypeVar("Read", bound=BaseModel)

TRIAL_FILE, RESULT_FILE = "trial.json", "result.json"


class Cell(BaseModel):
    """One figure of a table, in the experiment's unit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    row: str
    column: str
    value: float


class Trial(BaseModel, ABC):
    """One run. Its fields are everything that determines what it measures; `name` is that of its folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str

    @abstractmethod
    def measure(self, folder: Path, on_share: OnShare) -> list[Cell]:
        """Train in `folder`, going on from what a killed run left there, and return what was measured.

        Raises:
            TrainingDiverged: the loss is not finite.
        """


class Result(BaseModel):
    """What a finished trial measured.

    `seconds`: wall time. `core_seconds`: CPU time of its process, all threads together, which other work on the machine
    hardly changes. Both without what a killed run had spent before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    trial: str
    seconds: float
    core_seconds: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Experiment:
    """A table or figure of the paper at one scale.

    `published` are the paper's figures by (row, column), in the unit of `quantity`, or of `published_quantity` if that is
    another. `stand_in`: the data are not the paper's. `notes` say what was guessed and what differs. The picture shows the
    columns `plotted` (none: all), from `plotted_from` on (none: all of them whole).
    """

    name: str
    scale: Scale
    title: str
    quantity: str
    data: str
    stand_in: bool
    trials: tuple[Trial, ...]
    published: Mapping[tuple[str, str], float]
    published_quantity: str = ""
    notes: tuple[str, ...] = ()
    decimals: int = 1
    plotted: tuple[str, ...] = ()
    plotted_from: float | None = None


def run_trial(trial: Trial, out: Path, on_share: OnShare = lambda _: None) -> Result:
    """Run a trial in `out/runs/<name>`, or read its result if it is there already.

    Raises:
        ConfigError: the folder holds a trial of other settings.
        TrainingDiverged: the loss is not finite.
    """
    folder = out / "runs" / trial.name
    claim, finished = folder / TRIAL_FILE, folder / RESULT_FILE
    if claim.exists() and _read(type(trial), claim) != trial:
        raise ConfigError(f"{folder} was started with other settings: choose another --out, or remove the folder")
    if finished.exists():
        return _read(Result, finished)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(claim, trial.model_dump_json(indent=2).encode())
    start, cores = time.perf_counter(), time.process_time()
    cells = trial.measure(folder, on_share)
    seconds, core_seconds = time.perf_counter() - start, time.process_time() - cores
    result = Result(trial=trial.name, seconds=seconds, core_seconds=core_seconds, cells=tuple(cells))
    write_atomically(finished, result.model_dump_json(indent=2).encode())
    return result


def run_all(
    trials: Sequence[Trial], out: Path, jobs: int = 1, threads: int = 1
) -> Generator[tuple[Trial, Result | TrainingDiverged]]:
    """Run trials in `jobs` processes of `threads` CPU threads each; yield each trial as it ends, with its result.

    A trial that diverges ends with that error as its result; any other error ends all.
    """
    if jobs == 1:
        torch.set_num_threads(threads)
        for trial in trials:
            yield trial, _attempt(trial, out, threads)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        ends: dict[Future[Result | TrainingDiverged], Trial] = {
            pool.submit(_attempt, trial, out, threads): trial for trial in trials
        }
        try:
            for end in as_completed(ends):
                yield ends[end], end.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _attempt(trial: Trial, out: Path, threads: int) -> Result | TrainingDiverged:
    torch.set_num_threads(threads)
    try:
        return run_trial(trial, out)
    except TrainingDiverged as exc:
        return exc


def _read(kind: type[Read], file: Path) -> Read:
    try:
        return kind.model_validate_json(file.read_bytes())
    except ValidationError as exc:
        raise ConfigError(
            f"{file} cannot be used ({exc.error_count()} problems): remove its folder to measure again"
        ) from exc
