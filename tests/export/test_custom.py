"""Bundles of modules that are not ours: whatever torch can export, in all forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import GraphProto
from torch import Tensor, nn

import export.graph
from export.bundle import export_bundle
from family.manifest import BundleError
from training.checkpoint import Origin, Progress
from training.config import CustomConfig, RunConfig
from training.data_config import ArraysConfig
from training.dataset import Dataset
from training.model import Family, Standardise
from training.sources import load_data


@pytest.fixture
def pixels(tmp_path: Path) -> Dataset:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "pixels.npz", x=x, y=y)
    return load_data(ArraysConfig(file=tmp_path / "pixels.npz", pixels=True))


class Tokens(nn.Module):
    """An image's rows as tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class Mean(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 3)

    def forward(self, state: Tensor) -> Tensor:
        return self.out(state.mean(dim=-2))


def test_a_convolution_and_no_embedding_at_all_export(pixels: Dataset, tmp_path: Path) -> None:
    """Blocks of different kinds on states of three axes; an embedding without a node of its own in the graph."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.GroupNorm(1, 3), nn.Conv2d(3, 5, 1), nn.GELU(), nn.Dropout(0.5), nn.Conv2d(5, 3, 1)),
        nn.Identity(),
    ]
    family = Family(nn.Identity(), blocks, nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3)))
    config = RunConfig(model=CustomConfig(hierarchy_depth=2), data=pixels.source)
    exported = export_bundle(config, family, Progress(), Origin.here(), pixels, str(tmp_path / "1"))
    assert len(exported.differences) == 4
    assert all(max(d.gated, d.continued, d.torch or 0) < 1e-5 for d in exported.differences)
    assert exported.manifest.state.shape == (-1, 3, 8, 8)
    flops = {path: entry.flops for path, entry in exported.manifest.offered.items()}
    assert flops[(1, 2, 3)] - flops[(2, 3)] == 2 * 3 * 3 * 9 * 64  # the 3 x 3 convolution; the identity is free


def test_heads_of_different_kinds_export(pixels: Dataset, tmp_path: Path) -> None:
    """One for each exit: the gated graph reads that of the last block which it ran, whichever those were."""
    torch.manual_seed(0)
    embed = nn.Sequential(Standardise(pixels.spec), nn.Flatten(), nn.Linear(8 * 8 * 3, 16))
    blocks = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(7)]
    heads = [nn.Linear(16, 3), nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3)), nn.Linear(16, 3, bias=False)]
    family = Family(embed, blocks, heads)
    config = RunConfig(model=CustomConfig(hierarchy_depth=3), data=pixels.source)
    exported = export_bundle(config, family, Progress(), Origin.here(), pixels, tmp_path / "1")
    assert len(exported.differences) == 25
    assert all(max(d.gated, d.continued, d.torch or 0) < 1e-5 for d in exported.differences)
    parameters = {path: entry.parameters for path, entry in exported.manifest.offered.items()}
    of_a_block = 2 * 16 + 16 * 16 + 16
    assert parameters[(4, 6)] - parameters[(4,)] == of_a_block + 2 * 16
    assert parameters[(4, 6, 7)] - parameters[(4, 6)] == of_a_block - 2 * 16 - 3


def test_torchs_own_transformer_layers_export(pixels: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    embed = nn.Sequential(Standardise(pixels.spec), Tokens(), nn.Linear(24, 8))
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
    family = Family(embed, [layer], Mean(8))
    config = RunConfig(model=CustomConfig(hierarchy_depth=1), data=pixels.source)
    exported = export_bundle(config, family, Progress(), Origin.here(), pixels, tmp_path / "1")
    (difference,) = exported.differences
    assert max(difference.gated, difference.continued, difference.torch or 0) < 1e-5
    (entry,) = exported.manifest.offered.values()
    assert entry.flops > 2 * 8 * 8 * (3 + 1 + 2 + 2) * 8  # the layer's products are counted
    session = ort.InferenceSession(str(tmp_path / "1" / entry.file), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": pixels.test.x.numpy()})[0].shape == (len(pixels.test), 3)


class Branching(nn.Module):
    def forward(self, state: Tensor) -> Tensor:
        return state * 2 if state.sum() > 0 else state


def test_a_module_that_torch_cannot_export_is_named(pixels: Dataset, tmp_path: Path) -> None:
    family = Family(nn.Flatten(), [Branching()], nn.Linear(192, 3))
    config = RunConfig(model=CustomConfig(hierarchy_depth=1), data=pixels.source)
    with pytest.raises(BundleError, match="block1: torch cannot export this module to ONNX"):
        export_bundle(config, family, Progress(), Origin.here(), pixels, tmp_path / "1")
    assert not (tmp_path / "1").exists()


class Scaled(nn.Module):
    """Weights in plain sight, a constant that is none of them, and one that the exporter may compute from them."""

    def __init__(self, scale: float, *, fold: bool = False) -> None:
        super().__init__()
        self.scale, self.fold = scale, fold
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)
        self.register_buffer("shift", torch.randn(16))

    def forward(self, state: Tensor) -> Tensor:
        weight = self.weight.T * 2 + self.weight if self.fold else self.weight
        return state + self.scale * torch.tanh(state @ weight + self.shift)


@pytest.mark.parametrize(
    ("scales", "fold", "expected"),
    [
        ([0.5, 0.5, 0.5], False, [["embed", "block1", "head"]]),
        ([0.5, 2.0, 0.5], False, [["embed", "block1", "block2", "head"]]),
        ([0.5, 0.5, 0.5], True, [["embed", "block1", "head"], ["block2", "block3"]]),
    ],
    ids=["alike", "another constant", "weights computed with"],
)
def test_blocks_that_differ_in_weights_alone_are_translated_once(
    scales: list[float],
    fold: bool,
    expected: list[list[str]],
    pixels: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    embed = nn.Sequential(Standardise(pixels.spec), nn.Flatten(), nn.Linear(8 * 8 * 3, 16))
    family = Family(embed, [Scaled(scale, fold=fold) for scale in scales], nn.Linear(16, 3))
    translated: list[list[str]] = []
    translate = export.graph._translate

    def counted(modules: dict[str, tuple[nn.Module, Tensor]]) -> GraphProto:
        translated.append(list(modules))
        return translate(modules)

    monkeypatch.setattr(export.graph, "_translate", counted)
    config = RunConfig(model=CustomConfig(hierarchy_depth=2), data=pixels.source)
    exported = export_bundle(config, family, Progress(), Origin.here(), pixels, tmp_path / "1")
    assert all(max(d.gated, d.continued, d.torch or 0) < 1e-5 for d in exported.differences)
    assert translated == expected
