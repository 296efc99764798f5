"""Running the runs of a comparison: one after another in this process, or several at a time in processes of their own.

A run writes the same files in both: it has as many threads, and its randomness comes from its seed alone. What is known of
it goes to the caller as messages, in whichever order runs end.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from training.compare import Job, end_of, run
from training.config import BUILT_IN, MethodName
from training.custom import import_method
from training.dataset import Dataset
from training.model import Factory
from training.report import Record
from training.sources import load_data
from training.trainer import Report, TrainingDiverged

_TOLD_EVERY = 0.005
"""Share of a run between two messages of a process about how far it is."""


@dataclass(frozen=True, slots=True)
class At:
    """How far a run is: its step, and the share of its budget that is spent, 0..1."""

    step: int
    share: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run has no result; one that `diverged` would do so again."""

    reason: str
    diverged: bool = False


Message = At | Failure | list[Record]
"""Of a run: any number of times how far it is, then how it ended."""
Tell = Callable[[Job, Message], None]


def run_all(
    jobs: Sequence[Job],
    out: Path,
    data: Dataset,
    tell: Tell,
    *,
    factory: Factory | None = None,
    at_once: int = 1,
    threads: int = 1,
) -> None:
    """Run all, `at_once` at a time with `threads` CPU threads each, and tell what is known of them. One that fails does not
    keep the others from running. However this ends, no process goes on.

    Processes of their own read the data again, so each holds a copy. The `factory` of custom models is sent to them.
    """
    torch.set_num_threads(threads)
    waiting = deque(jobs)
    if at_once > 1:
        for job in jobs:
            if end_of(job, out):  # then it is only read
                tell(job, _attempt(job, out, lambda: data, lambda _: None, factory))
                waiting.remove(job)
        _run_in_processes(waiting, out, tell, factory, at_once, threads)
        return
    for job in jobs:
        tell(job, At(0, 0.0))
        tell(job, _attempt(job, out, lambda: data, partial(tell, job), factory))


def _run_in_processes(
    waiting: deque[Job], out: Path, tell: Tell, factory: Factory | None, at_once: int, threads: int
) -> None:
    """Each process takes one run after another; one that dies in a run takes no other run with it."""
    own = sorted({job.config.train.method for job in waiting} - set(BUILT_IN))
    started: list[SpawnProcess] = []
    working: dict[Connection, tuple[SpawnProcess, Job]] = {}

    def start() -> tuple[SpawnProcess, Connection]:
        process, pipe = _start(out, threads, own, factory)
        started.append(process)
        return process, pipe

    def give_to(process: SpawnProcess, pipe: Connection) -> None:
        job = waiting.popleft()
        pipe.send(job)
        working[pipe] = process, job
        tell(job, At(0, 0.0))

    try:
        for _ in range(min(at_once, len(waiting))):
            give_to(*start())
        while working:
            for pipe in wait(list(working)):
                assert isinstance(pipe, Connection)
                process, job = working[pipe]
                try:
                    message: Message = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    message = Failure(_how_it_ended(process.exitcode or 0))
                tell(job, message)
                if isinstance(message, At):
                    continue
                del working[pipe]
                if waiting:
                    give_to(*(process, pipe) if process.is_alive() else start())
    finally:
        for process in started:
            process.terminate()  # files are written atomically, and a folder's lock ends with its process
        for process in started:
            process.join()


def _start(out: Path, threads: int, own: list[MethodName], factory: Factory | None) -> tuple[SpawnProcess, Connection]:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, out, threads, own, factory), daemon=True)
    with _interrupts_ignored():  # inherited: a terminal sends Ctrl-C to all, and this process ends the others
        process.start()
    theirs.close()
    return process, ours


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(pipe: Connection, out: Path, threads: int, own: list[MethodName], factory: Factory | None) -> None:
    """Run what comes through the pipe, and tell of it. An unforeseen error ends the process, with its traceback."""
    torch.set_num_threads(threads)
    for name in own:
        import_method(name)
    read = cache(load_data)
    with suppress(EOFError, BrokenPipeError):  # who would want to know is gone
        while True:
            job: Job = pipe.recv()
            told = 0.0

            def tell(at: At) -> None:
                nonlocal told
                if at.share >= told + _TOLD_EVERY:
                    told = at.share
                    pipe.send(at)

            pipe.send(_attempt(job, out, partial(read, job.config.data), tell, factory))


def _attempt(
    job: Job, out: Path, read: Callable[[], Dataset], tell: Callable[[At], None], factory: Factory | None
) -> list[Record] | Failure:
    def on_step(report: Report) -> None:
        tell(At(report.step, report.share))

    try:
        return run(job, out, read(), on_step, factory)
    except TrainingDiverged as exc:
        return Failure(str(exc), diverged=True)
    except (OSError, ValueError) as exc:  # the data, the folder, the configuration, the disk
        return Failure(str(exc))


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"its process ended with status {status}"
    killed = signal.Signals(-status)
    why = ", as systems do when memory runs out: try fewer --jobs" if killed == signal.SIGKILL else ""
    return f"its process was ended by {killed.name}{why}"
