from __future__ import annotations

from pathlib import Path

import pytest

from training.config import (
    ConfigError,
    DigitsConfig,
    MlpConfig,
    ResMlpConfig,
    RunConfig,
    TrainConfig,
    VitConfig,
    dump_config,
    kinds_of,
    load_config,
    parse_override,
)
from training.config_page import config_tables, with_tables

CONFIGS = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.toml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_configurations_are_valid(file: Path) -> None:
    load_config(file)


def test_the_shipped_digits_are_the_defaults() -> None:
    assert load_config(next(file for file in CONFIGS if file.name == "digits.toml")) == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlearning_rate = 1", r"unknown key train.learning_rate: expected one of method, .*, lr, "),
        ("[model]\npatches = 4", r"unknown key model.patches: .* patch, .*, the keys of model.kind vit$"),
        ("[data]\nkind = 'mnist'\nfolder = '.'\nshft = 1", r"unknown key data.shft: .* shift, .* of data.kind mnist$"),
        ("[data]\nkind = 'table'\ntarget = 'y'", r": data.file: Field required"),
        ("[trian]\nlr = 1", r"unknown key trian: expected one of name, model, data, train$"),
        ("[train]\nlr = -1", r"train.lr: Input should be greater than 0"),
        ("[model]\nkind = 'cnn'", r"model: Input tag 'cnn'"),
        ("[model]\nkind = 'vit'\nheads = 5", r"heads must divide width, got width 48 and heads 5"),
        ("[train]\nmethod = 'magic'", r"train.method: .*expected one of hbll\+chains, .*, or module:name .* got 'magic'"),
        ("[train]\nmethod = 'bp'", r"method bp needs `blocks`"),
        ("[train]\nblocks = 3", r"`blocks` goes with methods bp and cffm, which train one network, not with hbll\+chains"),
        ("[train]\nmethod = 'cffm'\nblocks = 8", r"train.blocks must be in 1..7"),
        ("[train]\nmethod = 'bp'\nblocks = 8", r"train.blocks must be in 1..7"),
        ("not toml", r"cannot read the configuration"),
        ("train = 3", r"train: Input should be a valid"),
    ],
)
def test_a_wrong_configuration_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_flags_lie_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[train]\nseed = 1\nlr = 0.5")
    config = load_config(file, {"train.seed": 7})
    assert (config.train.seed, config.train.lr) == (7, 0.5)
    assert load_config(None).train == TrainConfig()


def test_any_key_can_be_set_by_its_dotted_name(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[train]\nlr = 0.5")
    texts = ["model.kind=resmlp", "model.width = 32", "train.lr=1e-3", "name=mine", 'data.kind="digits"']
    config = load_config(file, dict(map(parse_override, texts)))
    assert config.model == ResMlpConfig(width=32)
    assert (config.name, config.train.lr) == ("mine", 1e-3)
    assert load_config(None, {"model.width": 24}).model == VitConfig(width=24)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr", r"expected key=value like train.lr=1e-3, got 'train.lr'"),
        ("train..lr=1", r"expected key=value"),
        ("=1", r"expected key=value"),
        ("train.learning_rate=1", r"unknown key train.learning_rate: expected one of"),
        ("train.lr=fast", r"train.lr: Input should be a valid number"),
        ("name.first=x", r"cannot set name.first: name is 'digits', not a section"),
        ("train=3", r"train: Input should be a valid"),
    ],
)
def test_a_setting_that_cannot_be_is_named(text: str, message: str) -> None:
    digits = next(file for file in CONFIGS if file.name == "digits.toml")
    with pytest.raises(ConfigError, match=message):
        load_config(digits, dict([parse_override(text)]))


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(name="a-b", model=MlpConfig(width=7), train=TrainConfig(method="bp", blocks=3, lr=1e-7)),
        RunConfig(model=ResMlpConfig(hidden=9), data=DigitsConfig(shift=0), train=TrainConfig(method="cffm")),
    ],
    ids=["default", "bp", "cffm"],
)
def test_a_printed_configuration_can_be_read_back(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "config.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.toml") == config


def test_the_page_of_keys_is_what_they_say_of_themselves() -> None:
    page = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    assert config_tables() in page, "run `make config-page`"
    assert with_tables(page) == page
    assert with_tables(page.replace("| `lr` |", "| `rl` |")) == page


def test_every_key_says_what_it_is_for() -> None:
    sections = [RunConfig, TrainConfig, *kinds_of("model").values(), *kinds_of("data").values()]
    known = {"kind", "model", "data", "train"}  # headings of the page
    silent = {f"{each.__name__}.{key}" for each in sections for key, f in each.model_fields.items() if not f.description}
    assert {name for name in silent if name.partition(".")[2] not in known} == set()
