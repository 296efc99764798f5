"""Table 9: a family of language models by depth, beside separately trained networks of the same blocks."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from family.tree import Path as TreePath
from family.tree import Tree
from training.config import MethodName, TrainConfig
from training.evaluate import path_logits, score
from training.experiments import published
from training.experiments.experiment import Cell, Experiment, OnShare, Scale, Trial
from training.language import CausalBlocks, GptConfig, build_gpt
from training.loop import Recipe, device, fit
from training.methods import METHODS, Context
from training.model import Family
from training.text import Corpus, Text, Tokens, embedded_text, encode, read_text

WINDOWS_AT_ONCE = 64
"""When scoring."""


class TextTrial(Trial):
    """One family, or with method bp one network, and its score on the four paths of Table 9 (or its own).

    `folder`: of text files; none: the embedded text. `vocabulary`: of byte-pair tokens; none: bytes. Figures are
    perplexities of tokens with `perplexity`, else bits per byte.
    """

    folder: Path | None
    vocabulary: int | None
    perplexity: bool
    model: GptConfig
    settings: TrainConfig
    recipe: Recipe
    column: str

    def measure(self, folder: Path, on_share: OnShare) -> list[Cell]:
        """Train on random windows; score all windows of the test split."""
        corpus = encode(_text(self.folder), self.vocabulary, folder / "tokenizer.json")
        family = build_gpt(self.model, corpus.vocabulary, self.recipe.seed).to(device())
        self._train(family, corpus, folder, on_share)
        paths = table_paths(family.tree)
        if self.settings.method == "bp":
            paths = {name: path for name, path in paths.items() if len(path) == self.settings.blocks}
        losses = score_windows(family, corpus.test, tuple(paths.values()))
        return [
            Cell(row=published.path_row(name), column=self.column, value=self._figure(losses[path], corpus.test))
            for name, path in paths.items()
        ]

    def _train(self, family: Family, corpus: Corpus, folder: Path, on_share: OnShare) -> None:
        method, generator = METHODS[self.settings.method], torch.Generator()

        def step(_: int, rng: np.random.Generator) -> Tensor:
            generator.manual_seed(int(rng.integers(2**63)))
            x, y = corpus.train.windows(self.model.context, rng, self.recipe.batch)
            context = Context(self.settings, family, rng, generator)
            with torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
                return method.step(context, x.to(device()), y.to(device())).loss

        fit(family, self.recipe, step, folder, on_share)

    def _figure(self, nats: float, tokens: Tokens) -> float:
        return math.exp(nats) if self.perplexity else nats / math.log(2) / tokens.bytes_each


def table_paths(tree: Tree) -> dict[str, TreePath]:
    """The paths of Table 9 by their names there, as far as the tree has them (D = 3)."""
    return {
        name: next(path for path in (*tree.ladder, tree.full) if len(path) == blocks)
        for name, blocks in published.LADDER_AND_FULL.items()
    }


@torch.no_grad()
def score_windows(family: Family, tokens: Tokens, paths: tuple[TreePath, ...]) -> dict[TreePath, float]:
    """The mean cross-entropy of every path over all positions, in nats."""
    total, rows = dict.fromkeys(paths, 0.0), 0
    assert isinstance(family.blocks, CausalBlocks)
    for x, y in tokens.all_windows(family.blocks.context, WINDOWS_AT_ONCE):
        labels = y.to(device())
        for path, logits in path_logits(family, x.to(device()), paths).items():
            total[path] += score(logits, labels).loss * len(y)
        rows += len(y)
    return {path: loss / rows for path, loss in total.items()}


@lru_cache
def _text(folder: Path | None) -> Text:
    return embedded_text() if folder is None else read_text(folder)
