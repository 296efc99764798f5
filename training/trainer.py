"""The one training loop: batches, schedule, objective, validation, checkpoints, logs.

Work is counted in block evaluations, so that methods which cost different amounts a step are given equal budgets.
All randomness of a step comes from (seed, step) alone: a resumed run needs no stored generator and, on the same machine
with as many threads, repeats an uninterrupted one exactly. Ranks that train together (`training.distributed`) run the same
loop, each on its share of every step; the first of them validates and writes files.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from family import tree as algebra
from training.checkpoint import (
    BEST_FILE,
    CHECKPOINT_FILE,
    CONFIG_FILE,
    Progress,
    load_checkpoint,
    load_run_config,
    load_spec,
    remove_leftovers,
    save_checkpoint,
    save_config,
    save_spec,
    trainable,
    write_atomically,
)
from training.config import ConfigError, GptConfig, RunConfig, TrainConfig, describe_changes
from training.dataset import Augmentation, Dataset, Split
from training.diagnosis import diagnose
from training.distributed import ALONE, Team, gradient_buffer
from training.evaluate import PathScore, score_paths, watched_paths
from training.lock import alone_in
from training.methods import METHODS, Context, method_of, trained_paths
from training.model import Family, build_family
from training.objective import Step
from training.shapes import shapes_of

LOG_FILE = "log.csv"
_NOT_PATHS = {"step", "share", "lr", "loss"}
"""Columns of the log that are no path's validation accuracy."""


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint is intact."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the loop tells its caller after a step; `scores` only where the paths were validated."""

    step: int
    share: float  # of the budget spent, 0..1
    loss: float
    scores: dict[algebra.Path, PathScore] | None


@dataclass(slots=True)
class History:
    """The validation log of a run: one row per validation, kept as CSV."""

    file: Path
    rows: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path, up_to_step: int) -> History:
        """Load the rows of a run that is resumed at `up_to_step`; later ones belong to lost work."""
        if not file.exists():
            return cls(file)
        with file.open(newline="", encoding="utf-8") as opened:
            return cls(file, [row for row in csv.DictReader(opened) if int(row["step"]) <= up_to_step])

    @property
    def best(self) -> int:
        """The index of the row with the best mean validation accuracy of the watched paths, the first of equals."""
        # Rounded once, whatever the order: else equal rows differ in their last digit, and that decides.
        sums = [math.fsum(float(value) for name, value in row.items() if name not in _NOT_PATHS) for row in self.rows]
        return sums.index(max(sums))

    def is_stale(self, patience: int | None) -> bool:
        """Whether the last `patience` validations were no better than one before them."""
        return patience is not None and bool(self.rows) and len(self.rows) - 1 - self.best >= patience

    def append(self, row: dict[str, str]) -> None:
        """Add a row and rewrite the file atomically."""
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(row))
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.file, text.getvalue().encode())


def train(
    config: RunConfig,
    run: Path,
    data: Dataset,
    on_step: Callable[[Report], None],
    *,
    family: Family | None = None,
    resume: bool = False,
    wait: bool = False,
    team: Team = ALONE,
) -> Family:
    """Train a family into the folder `run` and return it: one that `config` describes, or the given one, freshly built.

    The folder gets `config.json`, `data.json`, `checkpoint.safetensors`, `best.safetensors`, `log.csv` and
    TensorBoard events. With `resume` a run that was killed goes on from its last checkpoint (or starts, where it has none).
    With `wait` another process that trains in the folder is let end first.

    Raises:
        ConfigError: `run` holds another run, another process trains there, resuming would change its configuration, the
            model does not fit the data, `team` cannot divide its steps, or batch normalisation gets a row alone.
        ShapeError: the modules of the family do not fit each other.
        CheckpointError: the checkpoint to resume from is damaged.
        TeamError: a rank is lost, or does not see the others' files.
        TrainingDiverged: the loss is not finite.
    """
    settings, method = config.train, method_of(config.train)
    _require_divisible(settings, team)
    batches = _Batches(settings, data.train, data.augment, method.views)
    if isinstance(config.model, GptConfig):
        raise ConfigError(
            "model.kind gpt is trained by `hbll reproduce table9`, on every position of a window at once: here its last "
            "position would be all that it learns from"
        )
    family = family or build_family(config.model, settings.seed, data.spec)
    _require_fit(family, data)
    paths = trained_paths(config, family.tree, watched_paths(family.tree))
    family = family.to(team.device).train()
    run.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        if team.leads:
            held.enter_context(alone_in(run, wait=wait))
        _claim(run, config, data, resume, team)
        parameters = list(trainable(family).values())
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        gradients = gradient_buffer(family)  # a block that no step has visited yet has moments like the others
        progress = load_checkpoint(run, family, optimizer) if (run / CHECKPOINT_FILE).exists() else Progress()
        team.require_agreement(progress.steps, f"checkpoint, in a folder {run} that all of them share (this is its step)")
        history = History.read(run / LOG_FILE, progress.steps)
        budget = max(1, round(settings.budget * len(data.train)))
        generator = torch.Generator()
        board = held.enter_context(_board(run, progress, team))

        while progress.evaluations < budget and not history.is_stale(settings.patience):
            share = progress.evaluations / budget
            rng = np.random.default_rng([settings.seed, progress.steps, 1])
            generator.manual_seed(int(rng.integers(2**63)))
            _seed_dropout(team.device, generator.initial_seed())
            x, y = batches.at(progress.steps, rng)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, progress.steps, share)
            rows = team.rows(len(y))
            x, y = x[rows].to(team.device), y[rows].to(team.device)
            gradients.zero_()
            with torch.autocast(team.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                step = _step(Context(settings, family, rng, generator, team), x, y)
            loss = team.sum(gradients, step.loss).item()
            _require_finite(loss, "loss", progress.steps, family, x)
            if settings.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            progress = Progress(progress.steps + 1, progress.evaluations + round(step.evaluations * team.data_ranks))

            scores = None
            done = progress.evaluations / budget
            is_due = int(done * settings.evaluations) > int(share * settings.evaluations) or done >= 1
            if is_due and team.leads:
                family.eval()
                scores = score_paths(family, data.validation, paths)
                family.train()
                validation_loss = sum(result.loss for result in scores.values())
                _require_finite(validation_loss, "validation loss", progress.steps, family, data.validation.x)
                history.append(_log_row(progress.steps, done, optimizer.param_groups[0]["lr"], loss, scores))
                assert board
                for path, result in scores.items():
                    board.add_scalar(f"validation_accuracy/{algebra.format_path(path)}", result.accuracy, progress.steps)
                save_checkpoint(run, family, optimizer, progress, best=history.best == len(history.rows) - 1)
            if board:
                board.add_scalar("train/loss", loss, progress.steps)
            on_step(Report(progress.steps, min(1.0, done), loss, scores))
        if settings.patience:
            load_checkpoint(run, family, name=BEST_FILE)
    return family.cpu().eval()


def _step(context: Context, x: Tensor, y: Tensor) -> Step:
    settings = context.settings
    try:
        return method_of(settings).step(context, x, y)
    except ValueError as exc:
        if "more than 1 value per channel" not in str(exc):
            raise
        raise ConfigError(
            f"batch normalisation needs two rows, and a step of {settings.method} runs one alone ({exc}): of train.batch "
            f"{settings.batch} each of train.chains {settings.chains} gets a share; take a larger batch or fewer chains"
        ) from exc


def _require_divisible(settings: TrainConfig, team: Team) -> None:
    """Ranks take equal shares of a batch, so that it does not matter how many they are."""
    if team.size == 1:
        return
    ways = method_of(settings).divided_by
    if not ways:
        raise ConfigError(f"method {settings.method} compares all rows of a batch: train it with one rank, not {team.size}")
    if team.tree_ranks > 1 and "tree" not in ways:
        able = " or ".join(name for name, method in METHODS.items() if "tree" in method.divided_by)
        raise ConfigError(
            f"method {settings.method} runs the blocks of a path one after the other, so ranks cannot divide a level of "
            f"the tree among them: leave --tree-ranks at 1, which divides the batch, or take --method {able}"
        )
    if settings.patience is not None:
        raise ConfigError(f"train.patience goes with one rank, which alone knows the validations, not with {team.size}")
    if settings.batch % team.data_ranks:
        raise ConfigError(f"{team.data_ranks} ranks cannot divide train.batch {settings.batch}: choose a multiple")


def _seed_dropout(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` of this device alone: that of all takes a quarter of a millisecond, at every step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _board(run: Path, progress: Progress, team: Team) -> AbstractContextManager[SummaryWriter | None]:
    return SummaryWriter(str(run / "tensorboard"), purge_step=progress.steps + 1) if team.leads else nullcontext()


def _require_finite(value: float, name: str, step: int, family: Family, x: Tensor) -> None:
    if not math.isfinite(value):
        raise TrainingDiverged(
            f"the {name} is {value} at step {step}: {diagnose(family, x)}. The last checkpoint is intact. Try a lower "
            "train.lr, or train.clip"
        )


def learning_rate(settings: TrainConfig, step: int, share: float) -> float:
    """Linear warm-up over steps, times a cosine to zero over the share of the budget spent."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    return settings.lr * warmup * 0.5 * (1 + math.cos(math.pi * share))


def _require_fit(family: Family, data: Dataset) -> None:
    shapes = shapes_of(family, data.train.x[:2])
    if shapes.classes != len(data.spec.labels):
        raise ConfigError(
            f"the head gives {shapes.classes} logits, and {data.spec.description} has {len(data.spec.labels)} classes"
        )


class _Batches:
    """The batch of any step: epochs are permutations drawn from (seed, epoch), augmentations are drawn per step.

    With `views` above 1 each row of the batch comes that often, each time augmented in its own way.
    """

    def __init__(self, settings: TrainConfig, train: Split, augment: Augmentation, views: int) -> None:
        if settings.batch > len(train):
            raise ConfigError(f"train.batch must be at most the {len(train)} training rows, got {settings.batch}")
        self._seed, self._size, self._augment = settings.seed, settings.batch, augment
        self._train, self._views = train, views
        self._steps = len(train) // settings.batch
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def at(self, step: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(step, self._steps)
        if epoch != self._epoch:
            order = np.random.default_rng([self._seed, epoch, 0]).permutation(len(self._train))
            self._epoch, self._order = epoch, torch.from_numpy(order)
        rows = self._order[index * self._size : (index + 1) * self._size].repeat(self._views)
        return self._augment(self._train.x[rows], rng), self._train.labels[rows]


def _claim(run: Path, config: RunConfig, data: Dataset, resume: bool, team: Team) -> None:
    """Make the run's folder ours: a new one, or with `resume` the one that the same configuration started.

    All ranks look, so that all refuse; one writes.
    """
    if (run / CHECKPOINT_FILE).exists() or ((run / CONFIG_FILE).exists() and resume):
        if not resume:
            raise ConfigError(f"{run} already holds a run: add --resume to go on with it, or choose another --out")
        before = load_run_config(run)
        if before != config:
            raise ConfigError(
                f"{run} was started with another configuration, {describe_changes(before, config)}: resume it with the same"
            )
        if changes := data.changes_since(load_spec(run)):
            raise ConfigError(f"{run} was started with other data, {changes}: restore them, or choose another --out")
    if team.leads:
        remove_leftovers(run)
        save_spec(run, data.spec_to_keep())
        save_config(run, config)


def _log_row(step: int, share: float, lr: float, loss: float, scores: dict[algebra.Path, PathScore]) -> dict[str, str]:
    row = {"step": str(step), "share": f"{share:.4f}", "lr": f"{lr:.3g}", "loss": f"{loss:.4f}"}
    return row | {algebra.format_path(path): f"{result.accuracy:.4f}" for path, result in scores.items()}
