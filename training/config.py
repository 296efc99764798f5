"""The one validated description of a training run: what a TOML file holds and what a checkpoint remembers."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from training.data_config import DataConfig, DigitsConfig, Section

BUILT_IN = "hbll+chains", "hbll", "hbll-paper", "chains", "paths", "exits", "cffm", "bp"
"""The methods that are there; what each does is in `training.methods`."""
MethodName = str
"""One of these, or `module:name` of the user's own, see `training.custom`."""
_IMPORTED = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what was expected."""


class _FamilyConfig(Section):
    hierarchy_depth: int = Field(
        3, ge=1, le=4, description="D; 2**D - 1 blocks. From 5 on there are too many paths to score"
    )


class VitConfig(_FamilyConfig):
    """A pre-norm Vision Transformer on square images, grey or of three colours."""

    kind: Literal["vit"] = "vit"
    patch: int = Field(7, ge=1, description="side of a square patch in pixels; must divide the image side")
    width: int = Field(48, ge=1, description="features of a token")
    heads: int = Field(2, ge=1, description="attention heads; must divide the width")
    hidden: int = Field(96, ge=1, description="hidden features of a block's MLP")
    exit_heads: bool = Field(
        True, description="a head for each of the nodes that paths end at, rather than one for all as published"
    )

    @model_validator(mode="after")
    def _divides(self) -> VitConfig:
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got width {self.width} and heads {self.heads}")
        return self


class MlpConfig(_FamilyConfig):
    """The sigmoid MLP of the paper's MNIST experiment: no residuals, no normalisation."""

    kind: Literal["mlp"] = "mlp"
    width: int = Field(100, ge=1, description="units of every layer")


class ResMlpConfig(_FamilyConfig):
    """A residual MLP: pre-norm blocks of one hidden layer, on all values of a row at once."""

    kind: Literal["resmlp"] = "resmlp"
    width: int = Field(64, ge=1, description="features of the state")
    hidden: int = Field(128, ge=1, description="hidden features of a block")


class GptConfig(_FamilyConfig):
    """GPT blocks on windows of `context` tokens; see `training.language`."""

    kind: Literal["gpt"] = "gpt"
    context: int = Field(64, ge=1, description="tokens of a window")
    width: int = Field(64, ge=1, description="features of a token")
    heads: int = Field(4, ge=1, description="attention heads; must divide the width")
    positions: bool = Field(False, description="learned positions, as in GPT-2; else ALiBi's slopes in every attention")

    @model_validator(mode="after")
    def _divides(self) -> GptConfig:
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got width {self.width} and heads {self.heads}")
        return self


class CustomConfig(_FamilyConfig):
    """The user's own modules, which Python code builds; see `training.custom`."""

    kind: Literal["custom"] = "custom"
    factory: str | None = Field(
        None,
        pattern=f"^{_IMPORTED}$",
        description="module:function, from a data set's description to a family; imported only if --factory names it too",
    )


ModelConfig = VitConfig | MlpConfig | ResMlpConfig | GptConfig | CustomConfig


class TrainConfig(Section):
    """How a family is trained."""

    method: MethodName = Field(
        "hbll+chains",
        description=f"what a step does: {', '.join(BUILT_IN)} (`hbll train -h` tells them apart), or module:name of one of "
        "yours, imported only if --method names it too",
    )
    blocks: int | None = Field(
        None, ge=1, description="blocks of the one network that bp or cffm trains; none: cffm trains all, bp must have it"
    )
    hbll_share: float = Field(0.1, ge=0, le=1, description="hbll+chains: the share of the budget that HBLL steps take")
    chains: int = Field(
        4,
        ge=1,
        description="hbll+chains and chains: sampled paths of a step. Of several the ladder has half of the rows, the "
        "others share the rest",
    )
    budget: float = Field(
        390, gt=0, description="block evaluations per training image (one: a block forward and backward on one row)"
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="of the initialisation, the order, the shifts, the chains and the noise"
    )
    batch: int = Field(64, ge=1, description="training rows of a step")
    lr: float = Field(8e-3, gt=0, description="peak of AdamW's rate, after the warm-up and before the cosine to zero")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW: a step shrinks weights by this share of its rate")
    warmup_steps: int = Field(100, ge=0, description="steps over which the rate rises to `lr`")
    nudge: float = Field(
        0.5, ge=0, description="c of HBLL's posterior step (eq. 31), on each example's own gradient; hbll-paper: always 1/4"
    )
    noise: float = Field(0.0, ge=0, description="sigma of HBLL's posterior sample")
    evaluations: int = Field(10, ge=1, description="how often in a run the paths are validated and a checkpoint written")
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many validations without a better mean accuracy, and use the best weights; none: go on "
        "to the end, where the rate is zero, and use the last",
    )
    clip: float | None = Field(None, gt=0, description="the gradient's norm is scaled down to at most this")
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="bf16: training steps run under autocast; weights, validation and export stay float32"
    )

    @field_validator("method")
    @classmethod
    def _is_a_method(cls, name: str) -> str:
        if name not in BUILT_IN and not re.fullmatch(_IMPORTED, name):
            raise ValueError(f"expected one of {', '.join(BUILT_IN)}, or module:name of a method of yours, got {name!r}")
        return name

    @model_validator(mode="after")
    def _blocks_go_with_one_network(self) -> TrainConfig:
        if self.blocks is None and self.method == "bp":
            raise ValueError("method bp needs `blocks`, the number of blocks of its one network (`--method bp --blocks 3`)")
        if self.blocks is not None and self.method not in ("bp", "cffm"):
            raise ValueError(f"`blocks` goes with methods bp and cffm, which train one network, not with {self.method}")
        return self


class RunConfig(Section):
    """Everything that determines a run."""

    name: str = Field("digits", pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$", description="the model's name when it is served")
    model: Annotated[ModelConfig, Field(discriminator="kind")] = VitConfig()
    data: DataConfig = DigitsConfig()
    train: TrainConfig = TrainConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _is_a_vit_unless_said(cls, raw: object) -> object:
        return {"kind": "vit"} | raw if isinstance(raw, dict) else raw

    @field_validator("data", mode="before")
    @classmethod
    def _is_digits_unless_said(cls, raw: object) -> object:
        return {"kind": "digits"} | raw if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _blocks_exist(self) -> RunConfig:
        most = 2**self.model.hierarchy_depth - 1
        if self.train.blocks is not None and self.train.blocks > most:
            raise ValueError(f"train.blocks must be in 1..{most} at hierarchy depth {self.model.hierarchy_depth}")
        return self


def load_config(path: Path | None, overrides: Mapping[str, object] | None = None) -> RunConfig:
    """Read a TOML file (none: all defaults) and lay `overrides`, by dotted keys like `train.lr`, over it.

    Raises:
        ConfigError: the file is missing or no TOML, or a key or value is wrong.
    """
    raw: dict[str, object] = {}
    if path is not None:
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
            raise ConfigError(f"cannot read the configuration {path}: {exc}") from exc
    return _laid_over(raw, overrides or {}, str(path or "the configuration"))


def change_config(config: RunConfig, overrides: Mapping[str, object], source: str) -> RunConfig:
    """`config` with `overrides`, by dotted keys, laid over it.

    Raises:
        ConfigError: a key or value is wrong.
    """
    return _laid_over(config.model_dump(), overrides, source)


def _laid_over(raw: dict[str, object], overrides: Mapping[str, object], source: str) -> RunConfig:
    for key, value in overrides.items():
        *sections, name = key.split(".")
        current = raw
        for section in sections:
            below = current.setdefault(section, {})
            if not isinstance(below, dict):
                raise ConfigError(f"cannot set {key}: {section} is {below!r}, not a section")
            current = below
        current[name] = value
    return parse_config(raw, source)


def parse_override(text: str) -> tuple[str, object]:
    """Read `train.lr=1e-3` as a dotted key and a value: a TOML value where it is one, else the text itself.

    Raises:
        ConfigError: there is no key or no `=`.
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"expected key=value like train.lr=1e-3, got {text!r}")
    try:
        parsed: object = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    return key, parsed


def dump_config(config: RunConfig) -> str:
    """Write a configuration as the TOML that `load_config` reads back."""
    lines = [f"name = {json.dumps(config.name)}"]
    for section in ("model", "data", "train"):
        values = getattr(config, section).model_dump(mode="json", exclude_none=True)
        lines += ["", f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def describe_changes(before: RunConfig, after: RunConfig) -> str:
    """What differs, by dotted keys: `train.lr 0.008 (now 0.004)`."""
    old, new = _by_key(before), _by_key(after)
    changed = [key for key in old | new if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {json.dumps(old.get(key))} (now {json.dumps(new.get(key))})" for key in changed)


def _by_key(config: RunConfig) -> dict[str, object]:
    sections = config.model_dump(mode="json")
    flat = {"name": sections.pop("name")}
    return flat | {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def parse_config(raw: object, source: str) -> RunConfig:
    """Validate plain data as a `RunConfig`; a `ConfigError` names `source` and every wrong key."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as exc:
        raise ConfigError(f"{source}: {'; '.join(map(_problem, exc.errors()))}") from exc


def kinds_of(section: Literal["model", "data"]) -> dict[str, type[Section]]:
    """What a section can be, by its key `kind`."""
    classes = get_args(ModelConfig) if section == "model" else get_args(get_args(DataConfig)[0])
    return {kind: each for each in classes for kind in get_args(each.model_fields["kind"].annotation)}


def _problem(error: ErrorDetails) -> str:
    """One wrong key, by its dotted name: pydantic has the kind of a section between the two."""
    place = list(map(str, error["loc"]))
    known: type[Section] = RunConfig
    of = ""
    match place:
        case ["model" | "data" as section, kind, *_] if kind in (kinds := kinds_of(section)):
            del place[1]
            known, of = kinds[kind], f", the keys of {section}.kind {kind}"
        case ["train", *_]:
            known = TrainConfig
    name = ".".join(place)
    if error["type"] == "extra_forbidden":
        return f"unknown key {name}: expected one of {', '.join(known.model_fields)}{of}"
    return f"{name or 'run'}: {error['msg']}"
