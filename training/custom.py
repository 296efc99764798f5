"""What is the user's own: families of any modules, trained from Python or built by a factory that the command line names,
and methods to train them by.

No configuration describes such a family, and nothing is unpickled: weights come from safetensors, and the modules from the
code that built them, run again.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from training.checkpoint import Origin, Progress, load_family, load_origin
from training.config import ConfigError, RunConfig, parse_config
from training.dataset import Dataset, DataSpec
from training.methods import METHODS, Method
from training.model import Factory, Family
from training.progress import train_with_bar


class Trained(NamedTuple):
    """A finished run, in the order in which `export.bundle.export_bundle` takes it."""

    config: RunConfig
    family: Family
    progress: Progress
    origin: Origin


def train_family(
    family: Family, data: Dataset, run: str | Path, *, name: str = "family", resume: bool = False, **settings: Any
) -> Trained:
    """Train the user's family into the folder `run`, with a progress bar.

    Args:
        name: the model's name when it is served.
        resume: go on with a run that was killed; `family` is built as it was then.
        settings: of the section `[train]` of a configuration, such as `budget=60, lr=1e-3, method="chains"`.

    Raises:
        ConfigError: a setting is wrong, or `run` holds another run.
        ShapeError: the modules do not fit each other; the message names the node.
        TrainingDiverged: the loss is not finite.
    """
    folder = Path(run)
    raw = {
        "name": name,
        "model": {"kind": "custom", "hierarchy_depth": family.tree.hierarchy_depth},
        "data": data.source.model_dump(),
        "train": settings,
    }
    config = parse_config(raw, "train_family")
    train_with_bar(config, folder, data, family=family, resume=resume)
    return load_trained(folder, lambda _spec: family)


def load_trained(run: str | Path, factory: Factory) -> Trained:
    """Load a run of the user's family; `factory` builds it as it was built for training.

    Raises:
        CheckpointError: the run is missing or damaged, or the factory gives a family of another shape.
    """
    folder = Path(run)
    return Trained(*load_family(folder, factory), load_origin(folder))


def import_factory(name: str) -> Factory:
    """Import `module:function`, from the working directory too. This runs the module's code: only for a name that the
    user gave, never for one that was read from a file. A process that the factory is sent to imports it itself.

    Raises:
        ConfigError: there is no such module or function.
    """
    _function(name)
    return partial(_build, name)


def import_method(name: str) -> Method:
    """Import `module:name`, as `import_factory` does, and make it a method by that name, for this process.

    Raises:
        ConfigError: there is no such module or name, or it is no `Method`.
    """
    found = _imported(name, "a method MODULE:NAME like my_methods:mine")
    if not isinstance(found, Method):
        raise ConfigError(f"{name} must be a training.methods.Method, got {type(found).__name__}")
    METHODS[name] = found
    return found


def _build(factory: str, spec: DataSpec) -> Family:
    family = _function(factory)(spec)
    if not isinstance(family, Family):
        raise ConfigError(f"the factory {factory} must return a training.model.Family, got {type(family).__name__}")
    return family


def _function(name: str) -> Any:
    return _imported(name, "--factory MODULE:FUNCTION like my_model:build")


def _imported(name: str, expected: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"expected {expected}, got {name!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"cannot import {name}: {exc}") from exc
