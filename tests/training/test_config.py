from __future__ import annotations

from pathlib import Path

import pytest

from training.config import ConfigError, RunConfig, TrainConfig, load_config

CONFIGS = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.toml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_configurations_are_valid(file: Path) -> None:
    load_config(file)


def test_the_shipped_digits_are_the_defaults() -> None:
    assert load_config(next(file for file in CONFIGS if file.name == "digits.toml")) == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlearning_rate = 1", r"train.learning_rate: Extra inputs are not permitted"),
        ("[train]\nlr = -1", r"train.lr: Input should be greater than 0"),
        ("[model]\nkind = 'cnn'", r"model: Input tag 'cnn'"),
        ("[model]\nkind = 'vit'\nheads = 5", r"heads must divide width, got width 48 and heads 5"),
        ("[train]\nmethod = 'bp'", r"method bp needs it"),
        ("[train]\nblocks = 3", r"`blocks` goes with method bp"),
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
    config = load_config(file, {"train": {"seed": 7}})
    assert (config.train.seed, config.train.lr) == (7, 0.5)
    assert load_config(None).train == TrainConfig()
