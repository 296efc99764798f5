from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hbll.cli import main
from tests.conftest import SMALL_VIT, Trained
from training.checkpoint import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    CheckpointError,
    Origin,
    load_checkpoint,
    load_family,
    load_origin,
    load_run_config,
    save_config,
    write_atomically,
)
from training.config import RunConfig


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    for name in (CHECKPOINT_FILE, CONFIG_FILE):
        (tmp_path / name).write_bytes((trained.run / name).read_bytes())
    return tmp_path


def test_a_truncated_checkpoint_is_named(run: Path) -> None:
    file = run / CHECKPOINT_FILE
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=rf"{CHECKPOINT_FILE} is damaged"):
        load_family(run)


def test_a_pickle_is_not_opened(run: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(run / "owned"),)

    (run / CHECKPOINT_FILE).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        load_family(run)
    assert not (run / "owned").exists()


def test_a_checkpoint_of_another_architecture_is_refused(run: Path) -> None:
    file = run / CONFIG_FILE
    file.write_text(file.read_text().replace('"width": 16', '"width": 32'))
    with pytest.raises(CheckpointError, match="does not fit the configuration"):
        load_family(run)


def test_a_run_from_before_exits_had_heads_has_one_head(tmp_path: Path) -> None:
    save_config(tmp_path, RunConfig(model=SMALL_VIT.model_copy(update={"exit_heads": False})))
    now = load_run_config(tmp_path)
    file = tmp_path / CONFIG_FILE
    said = json.loads(file.read_text())
    assert said["model"].pop("exit_heads") is False
    file.write_text(json.dumps(said))
    assert load_run_config(tmp_path) == now


@pytest.mark.parametrize("damage", ["missing", "short", "half"])
def test_optimizer_state_that_does_not_fit_is_refused(run: Path, damage: str) -> None:
    """AdamW's fused kernel believes the shapes: with a shorter moment it wrote past the end and took the process down."""
    file = run / CHECKPOINT_FILE
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("qkv_weight.exp_avg"))
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(1) if damage == "short" else tensors[name].half()
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata=metadata)
    _, family, _ = load_family(run)  # the weights are good
    with pytest.raises(CheckpointError, match="expected float32 optimizer state"):
        load_checkpoint(run, family, torch.optim.AdamW(family.parameters()))


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter:UserWarning")
def test_optimizer_state_goes_where_the_parameters_are(run: Path) -> None:
    """Bug found: a run on a GPU could not be resumed there, as its moments stayed in the memory of the CPU."""
    _, family, _ = load_family(run)
    family = family.to("meta")  # the only other device that every machine has
    optimizer = torch.optim.AdamW(family.parameters())
    load_checkpoint(run, family, optimizer)
    assert {tensor.device.type for state in optimizer.state.values() for tensor in state.values()} == {"meta"}


def test_a_checkpoint_says_what_wrote_it(run: Path) -> None:
    origin = load_origin(run)
    assert origin.libraries["torch"] == torch.__version__
    assert origin == Origin.here()


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no training run"):
        load_family(tmp_path)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"before")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"):
        write_atomically(file, b"after")
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_ends_a_run_in_a_sentence_and_it_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug found: a traceback."""
    arguments = ["train", "--out", str(tmp_path), "--budget", "2", "--set", "model.kind=mlp", "--set", "model.width=8"]
    sync, synced = os.fsync, list[int]()

    def full_later(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 9:  # of data.json, config.json, and of each checkpoint, log and all
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full_later)
    full = CliRunner().invoke(main, arguments)
    assert full.exit_code == 1
    assert re.search(r"Error: cannot write \S+: No space left on device. .* --resume", " ".join(full.output.split()))
    monkeypatch.setattr(os, "fsync", sync)
    assert 0 < load_family(tmp_path)[2].evaluations < 2 * 3000
    done = CliRunner().invoke(main, [*arguments, "--resume"])
    assert done.exit_code == 0, done.output


def test_two_processes_may_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug found: both wrote the same temporary file, and who renamed it last found none."""
    file, sync = tmp_path / "file", os.fsync

    def another_writes(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        write_atomically(file, b"another's")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", another_writes)
    write_atomically(file, b"ours")
    assert file.read_bytes() == b"ours"
    assert list(tmp_path.iterdir()) == [file]
