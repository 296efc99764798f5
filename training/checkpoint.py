"""Checkpoints: one safetensors file with weights, optimizer state and progress, beside the run's `config.json`
and the description of its data, `data.json`.

Nothing is ever unpickled, so a checkpoint from a stranger can be opened. Files appear atomically: a run killed
while writing leaves the checkpoint before it intact.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from training.config import RunConfig, parse_config
from training.dataset import DataSpec
from training.digits import DIGITS
from training.model import Factory, Family, build_family

CHECKPOINT_FILE = "checkpoint.safetensors"
BEST_FILE = "best.safetensors"
CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
_MODEL, _OPTIMIZER = "model.", "optimizer."


Weights = Literal["final", "best"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and says what was expected."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come: optimizer `steps` and block `evaluations` spent."""

    steps: int = 0
    evaluations: int = 0


@dataclass(frozen=True, slots=True)
class Origin:
    """What wrote a checkpoint: the source tree's git revision (none if not from a checkout) and library versions."""

    git_revision: str | None
    libraries: dict[str, str]

    @classmethod
    def here(cls) -> Origin:
        """Of this process."""
        return cls(_git_revision(), {name: version(name) for name in ("torch", "numpy", "mlxtend")})


def trainable(family: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name: all that the user has not frozen."""
    return {name: parameter for name, parameter in family.named_parameters() if parameter.requires_grad}


def write_atomically(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, or leave it as it was: written beside it, synced, renamed. Of two writers the last wins."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as exc:
        exc.filename = exc.filename or str(path)  # a write has none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(run: Path) -> None:
    """Remove what processes that were killed while they wrote a checkpoint left; for who holds the folder."""
    for file in (BEST_FILE, CHECKPOINT_FILE):
        for left in run.glob(f".{file}.*.tmp"):
            left.unlink(missing_ok=True)


def save_config(run: Path, config: RunConfig) -> None:
    """Write `config.json` of a run."""
    write_atomically(run / CONFIG_FILE, config.model_dump_json(indent=2).encode())


def load_run_config(run: Path) -> RunConfig:
    """Read the configuration that a run was started with. One from before exits could have heads has one head for all.

    Raises:
        CheckpointError: the folder holds no run, or its configuration is not valid.
    """
    file = run / CONFIG_FILE
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(raw, dict) and isinstance(model := raw.get("model"), dict) and model.get("kind") == "vit":
            model.setdefault("exit_heads", False)
        return parse_config(raw, str(file))
    except OSError as exc:
        raise CheckpointError(f"{run} holds no training run: cannot read {file} ({exc.strerror})") from exc
    except (ValueError, RecursionError) as exc:  # not text, not JSON, not a configuration
        raise CheckpointError(f"{file} is not the configuration of a run: {exc}") from exc


def save_spec(run: Path, spec: DataSpec) -> None:
    """Write `data.json` of a run."""
    write_atomically(run / DATA_FILE, spec.model_dump_json(indent=2).encode())


def load_spec(run: Path) -> DataSpec:
    """Read what the data of a run were; before there were others than the digits, a run did not say.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = run / DATA_FILE
    try:
        return DataSpec.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return DIGITS
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{file} is not the description of a run's data: {exc}") from exc


def save_checkpoint(
    run: Path, family: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, *, best: bool = False
) -> None:
    """Write weights, optimizer moments and progress as one file, and a second time as the best so far."""
    # safetensors refuses tensors that share memory, as a buffer does that several blocks were given.
    tensors = {
        _MODEL + name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in family.state_dict().items()
    }
    for name, parameter in family.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_OPTIMIZER}{name}.{key}"] = value
    origin = Origin.here()
    metadata = {
        "steps": str(progress.steps),
        "evaluations": str(progress.evaluations),
        "git_revision": origin.git_revision or "",
        "libraries": json.dumps(origin.libraries),
    }
    content = save(tensors, metadata=metadata)
    if best:
        write_atomically(run / BEST_FILE, content)
    write_atomically(run / CHECKPOINT_FILE, content)


def load_checkpoint(
    run: Path, family: nn.Module, optimizer: torch.optim.Optimizer | None = None, name: str = CHECKPOINT_FILE
) -> Progress:
    """Fill `family` (and `optimizer`) from a run's checkpoint and return its progress.

    Raises:
        CheckpointError: the file is missing, damaged, or of another architecture.
    """
    file = run / name
    tensors, metadata = _read(file)
    weights = {name.removeprefix(_MODEL): tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
    try:
        family.load_state_dict(weights)
        progress = Progress(int(metadata["steps"]), int(metadata["evaluations"]))
        if optimizer is not None:
            for name, parameter in trainable(family).items():
                prefix = f"{_OPTIMIZER}{name}."
                state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                _check_moments(name, parameter, state)
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    except (RuntimeError, KeyError, ValueError) as exc:
        raise CheckpointError(f"{file} does not fit the configuration beside it: {exc}") from exc
    return progress


def load_family(
    run: Path, factory: Factory | None = None, weights: Weights | None = None
) -> tuple[RunConfig, Family, Progress]:
    """Rebuild the family that a run trained, on the CPU, ready for evaluation; a custom one needs its `factory`.

    `weights` are the final ones or the best on validation data; not said: the best if the run could stop early, else the
    final ones, which come after the schedule's slow end.

    Raises:
        CheckpointError: as `load_run_config` and `load_checkpoint`.
        ConfigError: the model is custom and there is no factory.
    """
    config = load_run_config(run)
    family = build_family(config.model, config.train.seed, load_spec(run), factory)
    if weights is None:
        weights = "best" if config.train.patience else "final"
    progress = load_checkpoint(run, family, name=BEST_FILE if weights == "best" else CHECKPOINT_FILE)
    return config, family.eval(), progress


def load_origin(run: Path) -> Origin:
    """What wrote the checkpoint of a run.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    file = run / CHECKPOINT_FILE
    _, metadata = _read(file)
    try:
        return Origin(
            metadata["git_revision"] or None, {str(k): str(v) for k, v in json.loads(metadata["libraries"]).items()}
        )
    except (KeyError, ValueError, AttributeError) as exc:
        raise CheckpointError(f"{file} does not say what wrote it: {exc}") from exc


def _check_moments(name: str, parameter: Tensor, state: dict[str, Tensor]) -> None:
    """AdamW's fused kernel trusts these shapes and would write beyond a smaller tensor."""
    moments = {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": torch.Size([])}
    got = {key: tensor.shape for key, tensor in state.items()}
    if got != moments or any(tensor.dtype != torch.float32 for tensor in state.values()):
        raise ValueError(f"expected float32 optimizer state {moments} of {name}, got {got}")


def _git_revision() -> str | None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"{file} does not exist: train first, or give the folder that `hbll train --out` wrote"
        ) from exc
    except (safetensors.SafetensorError, OSError) as exc:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {exc}") from exc
