"""Trials that train one family of image classifiers with the common trainer: Tables 1, 3, 7 and 8."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from family.tree import Tree, format_path
from training.config import MethodName, MlpConfig, ModelConfig, RunConfig, TrainConfig
from training.data_config import DataConfig, DigitsConfig
from training.distributed import Team
from training.evaluate import path_logits
from training.experiments import published
from training.experiments.experiment import Cell, Experiment, OnShare, Scale, Trial
from training.experiments.source import data_of, describe, images
from training.loop import device
from training.methods import METHODS
from training.trainer import train


class Reading(BaseModel):
    """What a trial writes into a cell: the lowest test accuracy, in %, of these paths of its family.

    An answer is right if the label is among its `top` likeliest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    row: str
    column: str
    paths: tuple[str, ...]
    top: int = 1


class FamilyTrial(Trial):
    """One training run and the paths whose test accuracies are reported."""

    config: RunConfig
    readings: tuple[Reading, ...]

    def measure(self, folder: Path, on_share: OnShare) -> list[Cell]:
        """Train with the common loop, which resumes, and score the paths that are read."""
        data = data_of(self.config.data)
        team = Team(device=device())
        family = train(self.config, folder, data, lambda report: on_share(report.share), resume=True, team=team)
        paths = {text: family.tree.parse(text) for reading in self.readings for text in reading.paths}
        logits = dict(path_logits(family, data.test.x, paths.values()))
        labels = data.test.labels[:, None]

        def accuracy(text: str, top: int) -> float:
            return 100 * (logits[paths[text]].topk(top).indices == labels).any(dim=1).double().mean().item()

        return [
            Cell(row=reading.row, column=reading.column, value=min(accuracy(text, reading.top) for text in reading.paths))
            for reading in self.readings
        ]


def run_config(model: ModelConfig, data: DataConfig, method: MethodName, epochs: float, **settings: object) -> RunConfig:
    """A run of `epochs` passes over the training images; `settings` are those of `TrainConfig`."""
    train_config = TrainConfig.model_validate({"method": method, "evaluations": 2} | settings)
    budget = epochs * METHODS[method].evaluations(train_config, Tree(model.hierarchy_depth))
    return RunConfig(model=model, data=data, train=train_config.model_copy(update={"budget": budget}))


_MLP_METHODS: tuple[MethodName, ...] = "bp", "cffm", "hbll-paper", "hbll"


def table1(scale: Scale, folder: Path | None) -> Experiment:
    """Sigmoid MLPs without residuals or normalisation on MNIST: where backpropagation fails and HBLL does not."""
    depths, epochs = {"smoke": ((2, 4), 1), "small": ((2, 3, 4), 30), "paper": ((2, 3, 4), 100)}[scale]
    data = images("table1", scale, folder, DigitsConfig(shift=0))
    widths = {"smoke": {50: 1}, "small": {100: 3}, "paper": {100: 3, 50: 3, 500: 3}}[scale]
    trials = [
        _mlp_trial(method, data, hidden, depth, epochs, seed)
        for hidden, seeds in widths.items()
        for seed in range(seeds)
        for depth in depths
        for method in _MLP_METHODS
    ]
    return Experiment(
        name="table1",
        scale=scale,
        title="sigmoid MLPs without residuals or normalisation on MNIST",
        quantity="test accuracy, %",
        data=f"{describe(data)}; {epochs} epoch(s), batch 64, AdamW 1e-3.",
        stand_in=scale != "paper",
        trials=tuple(trials),
        published=published.TABLE1,
        notes=(
            "BP, CFF+M and HBLL: the full path of 2^D - 1 blocks and the head, which the paper counts as 2^D layers. HBLL "
            "is `hbll-paper`: latent losses summed over features, c = 1/4, no noise; `hbll` is our variant of it (a mean "
            "over features, c = 1/2). Worst rung: the lowest accuracy among the ladder's paths of 1 to D blocks.",
            "Guessed: the input layer is one more linear layer, trained by the root node's loss alone; weight decay 0.01; "
            "100 warm-up steps and a cosine to zero. CFF+M as in `training.objective.contrastive_step`, which says what "
            "was guessed there.",
        ),
    )


def _mlp_trial(method: MethodName, data: DataConfig, hidden: int, depth: int, epochs: int, seed: int) -> FamilyTrial:
    tree = Tree(depth)
    full, ladder = (format_path(tree.full),), tuple(map(format_path, tree.ladder))
    columns: dict[MethodName, dict[str, tuple[str, ...]]] = {
        "bp": {published.BP: full},
        "cffm": {published.CFFM: full},
        "hbll-paper": {published.HBLL: full, f"{published.HBLL}, worst rung": ladder},
        "hbll": {"`hbll`": full, "`hbll`, worst rung": ladder},
    }
    row = published.mlp_row(depth, hidden)
    return FamilyTrial(
        name=f"{method}-D{depth}-hidden{hidden}-seed{seed}",
        config=run_config(
            MlpConfig(hierarchy_depth=depth, width=hidden),
            data,
            method,
            epochs,
            batch=64,
            lr=1e-3,
            seed=seed,
            blocks=len(tree.nodes) if method == "bp" else None,
        ),
        readings=tuple(Reading(row=row, column=column, paths=paths) for column, paths in columns[method].items()),
    )
