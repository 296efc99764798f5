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
from training.checkpoint import save_config, save_spec
from training.config import GptConfig, MethodName, RunConfig, TrainConfig
from training.data_config import TextConfig
from training.evaluate import path_logits, score
from training.experiments import published
from training.experiments.experiment import Cell, Experiment, OnShare, Scale, Trial
from training.experiments.source import require_folder
from training.language import CausalBlocks, build_gpt
from training.loop import Recipe, device, fit
from training.methods import METHODS, Context
from training.model import Family
from training.publications import TEXTS
from training.text import Corpus, Text, Tokens, encode, text_of, windows_spec

WINDOWS_AT_ONCE = 64
LOGITS_AT_ONCE = 2**26
"""When scoring: as many windows of a path, but no more logits than these, a quarter of a GiB."""
VOCABULARY = 50_257
"""Byte-pair tokens: GPT-2's number of them, of which the paper says nothing."""
WIKITEXT103_TOKENS = 103_227_021
"""Words of its training text, by its authors; the number of byte-pair tokens differs a little."""
NOISE = 0.005
"""The paper's sigma for WikiText-103."""


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
        text = _text(self.folder)
        tokenizer = folder / "tokenizer.json"
        corpus = encode(text, self.vocabulary, tokenizer)
        self._describe(folder, text, corpus, tokenizer)
        family = build_gpt(self.model, corpus.vocabulary, self.recipe.seed).to(device())
        self._train(family, corpus, folder, on_share)
        paths = table_paths(family.tree)
        if self.settings.method == "bp":
            paths = {name: path for name, path in paths.items() if len(path) == self.settings.blocks}
        losses = score_windows(family, corpus, tuple(paths.values()))
        return [
            Cell(row=published.path_row(name), column=self.column, value=self._figure(losses[path], corpus.test))
            for name, path in paths.items()
        ]

    def _describe(self, folder: Path, text: Text, corpus: Corpus, tokenizer: Path) -> None:
        """Leave what `hbll evaluate` and `hbll export` read of a run: they take whole windows as rows."""
        data = TextConfig(
            context=self.model.context, folder=self.folder, tokenizer=None if self.vocabulary is None else tokenizer
        )
        recipe, windows = self.recipe, len(corpus.train.ids) / self.model.context
        evaluations = METHODS[self.settings.method].evaluations(self.settings, Tree(self.model.hierarchy_depth))
        # What is used, as far as there are keys for it: for AdamW's beta2, and a rate that stays, there are none.
        used = {
            "seed": recipe.seed,
            "budget": recipe.steps * recipe.batch * evaluations / windows,
            "batch": recipe.batch,
            "lr": recipe.lr,
            "weight_decay": recipe.weight_decay,
            "warmup_steps": recipe.warmup_steps,
            "clip": recipe.clip,
            "evaluations": recipe.checkpoints,  # which are written, and not validated
            "precision": "bf16" if device().type == "cuda" else "float32",
        }
        settings = TrainConfig.model_validate(self.settings.model_dump() | used)
        save_config(folder, RunConfig(name="text", model=self.model, data=data, train=settings))
        save_spec(folder, windows_spec(text, corpus, self.model.context))

    def _train(self, family: Family, corpus: Corpus, folder: Path, on_share: OnShare) -> None:
        method, generator = METHODS[self.settings.method], torch.Generator()

        def step(_: int, rng: np.random.Generator) -> Tensor:
            generator.manual_seed(int(rng.integers(2**63)))
            x, y = corpus.train.windows(self.model.context, rng, self.recipe.batch)
            context = Context(self.settings, family, rng, generator)
            with torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
                return method.step(context, x.to(device()), y.to(device())).loss

        rows = self.recipe.batch * self.model.context
        evaluations = round(method.evaluations(self.settings, family.tree) * rows)
        fit(family, self.recipe, step, folder, on_share, evaluations)

    def _figure(self, nats: float, tokens: Tokens) -> float:
        return math.exp(nats) if self.perplexity else nats / math.log(2) / tokens.bytes_each


def table_paths(tree: Tree) -> dict[str, TreePath]:
    """The paths of Table 9 by their names there, as far as the tree has them (D = 3)."""
    return {
        name: next(path for path in (*tree.ladder, tree.full) if len(path) == blocks)
        for name, blocks in published.LADDER_AND_FULL.items()
    }


@torch.no_grad()
def score_windows(family: Family, corpus: Corpus, paths: tuple[TreePath, ...]) -> dict[TreePath, float]:
    """The mean cross-entropy of every path over all positions of the test split, in nats."""
    total, rows = dict.fromkeys(paths, 0.0), 0
    assert isinstance(family.blocks, CausalBlocks)
    context = family.blocks.context
    at_once = max(1, min(WINDOWS_AT_ONCE, LOGITS_AT_ONCE // (context * corpus.vocabulary)))
    for x, y in corpus.test.all_windows(context, at_once):
        labels = y.to(device())
        for path, logits in path_logits(family, x.to(device()), paths):
            total[path] += score(logits, labels).loss * len(y)
        rows += len(y)
    return {path: loss / rows for path, loss in total.items()}


@lru_cache
def _text(folder: Path | None) -> Text:
    return text_of(folder)


def table9(scale: Scale, folder: Path | None) -> Experiment:
    """A GPT family of D = 3 against networks of 1, 2, 3 and 7 of the same blocks."""
    perplexity = scale == "paper"
    match scale:
        case "smoke":
            model, batch, steps = GptConfig(context=16, width=16, heads=2), 4, 10
        case "small":
            model, batch, steps = GptConfig(context=64, width=64, heads=4), 16, 1500
        case "paper":
            folder = require_folder("table9", folder)
            model, batch = GptConfig(context=1024, width=768, heads=12, positions=True), 2
            steps = 10 * WIKITEXT103_TOKENS // (batch * model.context)
    recipe = Recipe(
        steps=steps,
        batch=batch,
        lr=1e-4 if perplexity else 4e-3,
        weight_decay=0.01,
        beta2=0.999 if perplexity else 0.99,
        warmup_steps=steps // 15,
        clip=1.0,
    )
    tree = Tree(model.hierarchy_depth)
    equal_work = steps * sum(published.LADDER_AND_FULL.values())  # of the separate networks together

    def trial(column: str, method: MethodName, steps: int, **changes: object) -> TextTrial:
        settings = TrainConfig.model_validate({"method": method, "nudge": 0.0, "noise": NOISE * perplexity} | changes)
        return TextTrial(
            name=f"{method}{settings.blocks or ''}-{steps}steps",
            folder=folder,
            vocabulary=VOCABULARY if perplexity else None,
            perplexity=perplexity,
            model=model,
            settings=settings,
            recipe=recipe.model_copy(update={"steps": steps}),
            column=column,
        )

    trials = [trial(published.BP, "bp", steps, blocks=blocks) for blocks in published.LADDER_AND_FULL.values()]
    trials.append(trial(published.HBLL, "hbll", steps))
    mixed = TrainConfig(method="hbll+chains", chains=1)
    of_a_step = METHODS[mixed.method].evaluations(mixed, tree)
    trials.append(trial("`hbll+chains`, equal work", mixed.method, round(equal_work / of_a_step), chains=1))
    text = _text(folder)
    return Experiment(
        name="table9",
        scale=scale,
        title="a GPT family by depth, and separately trained networks",
        quantity="perplexity of test tokens" if perplexity else "bits per byte of test text",
        data=f"{text.description}, in train, validation and test; width {model.width}, {model.heads} heads, context "
        f"{model.context}, batch {batch}, AdamW {recipe.lr:g}, {steps:,} steps for BP and HBLL.",
        stand_in=text.description != TEXTS["wikitext103"].title,
        trials=tuple(trials),
        published=published.TABLE9,
        published_quantity="" if perplexity else "perplexity",
        notes=(
            "BP: one network for each row. HBLL: one family, as many steps as each of those networks. Equal work: as many "
            f"block evaluations as those networks together ({equal_work:,} batches of one block).",
            "HBLL without a nudge (c = 0): a nudged state carries the next token, which it is to be predicted from. Latent "
            "losses are means over features, over positions too.",
            "Guessed: width, heads and weights' initialisation; warm-up for a fifteenth of the steps and a cosine to zero; "
            "gradients longer than 1 clipped. "
            + (f"Byte-pair tokens ({VOCABULARY:,}) of the training text, learned positions." if perplexity else "ALiBi."),
        ),
        decimals=2 if perplexity else 3,
    )
