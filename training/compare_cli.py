"""`hbll compare`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click
from rich.markup import escape
from rich.progress import Progress

from family import tree as algebra
from training import compare as comparison
from training.checkpoint import CheckpointError
from training.cli import (
    METHODS_HELP,
    budget_option,
    cannot_write,
    config_option,
    factory_option,
    find_method,
    set_option,
    stop,
    threads_option,
)
from training.compare import Job
from training.config import BUILT_IN, ConfigError, MethodName, load_config
from training.dataset import Dataset
from training.model import Factory, build_family
from training.progress import Interrupted, console, interruptible, progress_columns
from training.report import Record, write_report
from training.sources import load_data
from training.workers import At, Failure, Message, run_all

_SEEDS = re.compile(r"\s*(?P<first>\d+)\s*(-\s*(?P<last>\d+)\s*)?")


def _method_names(_context: click.Context, _option: click.Parameter, text: str) -> tuple[MethodName, ...]:
    return tuple(dict.fromkeys(find_method(part.strip()) for part in text.split(",")))


def _seeds(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    seeds: dict[int, None] = {}
    for part in text.split(","):
        found = _SEEDS.fullmatch(part)
        first, last = (int(found["first"]), int(found["last"] or found["first"])) if found else (0, -1)
        if last < first:
            raise click.BadParameter(
                f"expected whole numbers from 0 on, or ranges of them, with commas between them, like 0,1,2 or 0-9,20; "
                f"got {part!r}"
            )
        seeds |= dict.fromkeys(range(first, last + 1))
    return tuple(seeds)


def _rates(_context: click.Context, _option: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError as exc:
        raise click.BadParameter(f"expected learning rates with commas between them, got {text!r}") from exc


@click.command(epilog=METHODS_HELP)
@config_option
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/compare"), show_default=True)
@click.option(
    "--methods",
    default=",".join(BUILT_IN),
    callback=_method_names,
    help="With commas between them; MODULE:NAME runs one of yours.  [default: all of ours]",
)
@click.option(
    "--seeds", default="0-2", show_default=True, callback=_seeds, help="Numbers and ranges, with commas between them."
)
@click.option(
    "--rates", default="", callback=_rates, help="Learning rates to choose from for every method, with commas between them."
)
@click.option(
    "--tuning-seeds", default="100", show_default=True, callback=_seeds, help="Of the runs that decide about --rates."
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at the same time.")
@click.option("--dry-run", is_flag=True, help="List the runs, and which of them are there already, and exit.")
@budget_option
@set_option
@factory_option
@threads_option
def compare(
    config: Path | None,
    out: Path,
    methods: tuple[MethodName, ...],
    seeds: tuple[int, ...],
    rates: tuple[float, ...],
    tuning_seeds: tuple[int, ...],
    jobs: int,
    dry_run: bool,
    budget: float | None,
    settings: dict[str, object],
    factory: Factory | None,
    threads: int,
) -> None:
    """Train several methods over several seeds, at equal work and at equal epochs, and report accuracy over blocks.

    Every method but bp trains one family: for all of --budget, and for as many epochs as separate networks of 1..D and of
    all blocks get when they share --budget. These networks are what bp means here; they are also trained for as many
    steps as the first of the other methods. A model of kind custom is built by --factory, for every run anew, and a
    separate network is one path of it. With --rates, every method and every separate network first gets the rate
    that is best on validation data at the seeds --tuning-seeds, which the comparison itself should not use.

    The folder --out gets comparison.md, comparison.csv, comparison.png, and the runs. A run that has ended is not
    repeated and one that was killed goes on: give the same command again. Processes with different --seeds can share
    an --out; a last call with all seeds then reports them together.

    With --jobs several runs train at a time, each in a process of its own with --threads threads, and with a copy of the
    data in memory. They give what they give one after another. A run that fails is named, and the others go on.

    \b
    Examples:
      hbll compare --config training/configs/digits.toml
      hbll compare --config training/configs/resmlp.toml --rates 2e-3,4e-3,8e-3
      hbll compare --seeds 0-9 --jobs 4 --dry-run
      hbll compare --config own.toml --factory my_model:build
      hbll compare --methods exits,bp --seeds 0 --budget 13 --out runs/smoke
    """
    given: dict[str, object] = {} if budget is None else {"train.budget": budget}
    try:
        with interruptible(f"stopped before the first run: {out} is as it was, and the same command begins again"):
            base = load_config(config, given | settings)
            data = load_data(base.data)
            images = len(data.train)
            build_family(base.model, base.train.seed, data.spec, factory)  # what cannot be is told before hours of tuning
            tuning = comparison.plan_tuning(base, methods, tuning_seeds, rates)
            planned = comparison.plan(base, methods, seeds, images)
            comparison.require_unclaimed(tuning, out)
            comparison.require_unclaimed(planned, out, rates_known=not tuning)
        if dry_run:
            ends = [comparison.end_of(job, out) for job in tuning]
            if is_tuned := all(ends):
                finished = [job for job, end in zip(tuning, ends, strict=True) if end == "finished"]
                tuned = [(job, comparison.run(job, out, data, lambda _: None)) for job in finished]  # which only reads
                planned = comparison.plan(base, methods, seeds, images, comparison.choose_rates(base, tuned))
                comparison.require_unclaimed(planned, out)
            _list(tuning, planned, out, images, is_tuned=is_tuned)
            return
        _tell_if_crowded(jobs, threads)
        tuned = _run_with_bar("tuning", tuning, out, data, factory, jobs, threads) if tuning else []
        planned = comparison.plan(base, methods, seeds, images, comparison.choose_rates(base, tuned))
        comparison.require_unclaimed(planned, out)
        found = tuned + _run_with_bar("comparing", planned, out, data, factory, jobs, threads)
        records = [record for _, of_run in found for record in of_run]
        sizes = comparison.separate_blocks(algebra.Tree(base.model.hierarchy_depth))
        with interruptible(f"stopped in the report: all runs in {out} have ended, and the same command reports on them"):
            text = write_report(base, sizes, seeds, records, out)
    except Interrupted as exc:
        stop(exc)
    except OSError as exc:
        cannot_write(exc, out, ". The runs are kept: once that is fixed, the same command goes on, and reports on them")
    except (ConfigError, CheckpointError, ValueError) as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(text)
    console.print(f"wrote comparison.md, comparison.csv and comparison.png in {out}")


def _list(tuning: list[Job], planned: list[Job], out: Path, images: int, *, is_tuned: bool) -> None:
    """Print every run, and how much of it is done; not known of those whose rate has still to be chosen."""
    line = "{:11}  {:7}  {:>4}  {:>8}  {:>11}  {:>6}  {}"
    click.echo(line.format("method", "matched", "seed", "rate", "evaluations", "epochs", "state"))
    ended, left = 0, 0.0
    for job in (*tuning, *planned):
        settings, rate, state, share = job.config.train, f"{job.config.train.lr:g}", "to train", 0.0
        if job.matched != "tuning" and not is_tuned:
            rate, state = "tuned", "after tuning"
        elif end := comparison.end_of(job, out):
            state, share, ended = end, 1.0, ended + 1
        elif share := comparison.share_trained(job, out):
            state = f"{share:.0%} done"
        left += (1 - share) * settings.budget * images
        name, budget, epochs = f"{settings.method}{settings.blocks or ''}", f"{settings.budget:.1f}", f"{job.epochs:.1f}"
        click.echo(line.format(name, job.matched, settings.seed, rate, budget, epochs, state))
    count = len(tuning) + len(planned)
    click.echo(
        f"{count} runs, {ended} ended, {count - ended} left: {left / 1e6:.1f} million block evaluations\n"
        "(the column has those of one training image)"
    )


def _tell_if_crowded(jobs: int, threads: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs > 1 and jobs * threads > cores:
        console.print(
            f"--jobs {jobs} with --threads {threads} takes {jobs * threads} cores, and there are {cores}: runs wait"
        )


def _run_with_bar(
    what: str, jobs: list[Job], out: Path, data: Dataset, factory: Factory | None, at_once: int, threads: int
) -> list[tuple[Job, list[Record]]]:
    """All runs and what they found; one that diverges is named and left out.

    Raises:
        Interrupted: as a `KeyboardInterrupt`, with how far the runs were.
        ConfigError: some failed otherwise; the others have run.
    """
    work = {job.name: job.config.train.budget * len(data.train) for job in jobs}
    console.print(f"{what}: {len(jobs)} runs, {sum(work.values()) / 1e6:.1f} million block evaluations")
    running: dict[str, At] = {}
    ends: dict[str, list[Record] | Failure] = {}
    with Progress(*progress_columns("{task.description}"), console=console, refresh_per_second=4) as bar:
        task = bar.add_task(what, total=sum(work.values()))

        def tell(job: Job, message: Message) -> None:
            if isinstance(message, At):
                running[job.name] = message
            else:
                running.pop(job.name, None)
                ends[job.name] = message
                console.print(f"{job.name}: {_how_it_ended(message)}", highlight=False)
            done = sum(work[name] for name in ends) + sum(work[name] * at.share for name, at in running.items())
            now = f"{len(running)} at work" if len(running) > 1 else "".join(running)
            bar.update(task, completed=done, description=f"{len(ends)}/{len(jobs)} {now}".rstrip())

        try:
            run_all(jobs, out, data, tell, factory=factory, at_once=at_once, threads=threads)
        except KeyboardInterrupt as exc:
            where = ", ".join(f"{name} at step {at.step} ({at.share:.0%})" for name, at in running.items())
            raise Interrupted(
                f"stopped with {len(ends)} of {len(jobs)} runs ended{where and f', in {where}'}: the same command goes on "
                "from the last checkpoints"
            ) from exc
    if failed := [name for name, end in ends.items() if isinstance(end, Failure) and not end.diverged]:
        raise ConfigError(
            f"{len(failed)} of {len(jobs)} runs failed, for the reasons above: {', '.join(failed)}. The others are kept: "
            "the same command trains these again"
        )
    return [(job, end) for job in jobs if isinstance(end := ends[job.name], list)]


def _how_it_ended(end: list[Record] | Failure) -> str:
    if isinstance(end, Failure):
        return f"[red]{'left out' if end.diverged else 'failed'}:[/red] {escape(end.reason)}"
    reference = max(end, key=lambda record: record.validation_accuracy)
    return f"{100 * reference.test_accuracy:.1f} % on path {reference.path}"
