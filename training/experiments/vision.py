"""Tables 3, 7 and 8: Vision Transformers of D = 3, one family against separately trained networks of the same blocks."""

from __future__ import annotations

from collections.abc import Iterable

from family.tree import Tree, format_path
from training.config import MethodName, RunConfig, TrainConfig, VitConfig
from training.data_config import DigitsConfig
from training.experiments import published
from training.experiments.experiment import Experiment, Scale
from training.experiments.families import DIGITS_USED, FamilyTrial, Reading, run_config
from training.methods import METHODS

EPOCHS = {"smoke": 1, "small": 15, "paper": 500}
_GUESSES = (
    "Guessed: the width and heads of the ViT and its patches; warm-up of 100 steps and a cosine to zero. HBLL is "
    "`hbll-paper`: latent losses summed over features, c = 1/4."
)


def _model(scale: Scale) -> VitConfig:
    if scale == "smoke":
        return VitConfig(hierarchy_depth=3, patch=14, width=8, heads=2, hidden=16)
    return VitConfig(hierarchy_depth=3)


def _config(scale: Scale, method: MethodName, data: DigitsConfig, noise: float, **settings: object) -> RunConfig:
    settings = {"epochs": EPOCHS[scale], "noise": noise if method == "hbll-paper" else 0.0} | settings
    if scale == "paper":
        settings |= {"batch": 256, "lr": 5e-4}
    return run_config(_model(scale), data, method, **settings)  # type: ignore[arg-type]


def _data(scale: Scale, shift: int) -> str:
    config = _config(scale, "hbll", DigitsConfig(shift=shift), 0.0)
    model = _model(scale)
    return (
        f"{DIGITS_USED}, moved by up to {shift} pixels; ViT of width {model.width}, "
        f"patches of {model.patch} x {model.patch}, {EPOCHS[scale]} epoch(s), batch {config.train.batch}, "
        f"AdamW {config.train.lr:g}."
    )


def _by_depth(name: str, scale: Scale, top: int, noise: float, figures: published.Figures, title: str) -> Experiment:
    """A family on the four paths of the table, and networks of as many blocks; all with equal epochs, one also with equal
    work."""
    tree, shift = Tree(3), 4
    paths = dict(zip(published.LADDER_AND_FULL, map(format_path, (*tree.ladder, tree.full)), strict=True))

    def trial(method: MethodName, column: str, names: Iterable[str], **settings: object) -> FamilyTrial:
        return FamilyTrial(
            name=f"{method}{settings.get('blocks', '')}",
            config=_config(scale, method, DigitsConfig(shift=shift), noise, **settings),
            readings=tuple(
                Reading(row=published.path_row(name), column=column, paths=(paths[name],), top=top) for name in names
            ),
        )

    work = EPOCHS[scale] * sum(published.LADDER_AND_FULL.values())
    of_an_epoch = METHODS["hbll+chains"].evaluations(TrainConfig(), tree)
    trials = (
        *(trial("bp", published.BP, [path], blocks=blocks) for path, blocks in published.LADDER_AND_FULL.items()),
        trial("cffm", published.CFFM, [*paths][-1:]),
        trial("hbll-paper", published.HBLL, paths),
        trial("hbll+chains", "`hbll+chains`, equal work", paths, epochs=work / of_an_epoch),
    )
    return Experiment(
        name=name,
        scale=scale,
        title=title,
        quantity=f"test accuracy, % (top {top} of 10)" if top > 1 else "test accuracy, %",
        data=_data(scale, shift),
        stand_in=True,
        trials=trials,
        published=figures,
        notes=(
            "BP: one network for each row. HBLL: one family, as many epochs as each of those networks. Equal work: as many "
            "block evaluations as those networks together.",
            _GUESSES,
        ),
    )


def table7(scale: Scale) -> Experiment:
    """CIFAR-10; here the digits."""
    return _by_depth("table7", scale, 1, 0.005, published.TABLE7, "a ViT family by depth (the paper: CIFAR-10)")


def table8(scale: Scale) -> Experiment:
    """Top 5 of CIFAR-100's classes; here the top 2 of ten digits."""
    return _by_depth("table8", scale, 2, 0.002, published.TABLE8, "a ViT family by depth (the paper: top 5 of CIFAR-100)")


def table3(scale: Scale) -> Experiment:
    """Missing input and label noise: the full path of an HBLL family against backpropagation through as many blocks."""
    tree, shift = Tree(3), 0
    full = format_path(tree.full)
    columns: tuple[tuple[MethodName, str], ...] = ("bp", published.BP), ("hbll-paper", published.HBLL), ("hbll", "`hbll`")
    corruptions = {"clean": (0.0, 0.0), "M50": (0.5, 0.0)} if scale == "smoke" else published.CORRUPTIONS
    trials = tuple(
        FamilyTrial(
            name=f"{row}-{method}",
            config=_config(
                scale,
                method,
                DigitsConfig(shift=shift, missing=missing, label_noise=label_noise),
                0.005,
                blocks=len(tree.nodes) if method == "bp" else None,
            ),
            readings=(Reading(row=row, column=column, paths=(full,)),),
        )
        for row, (missing, label_noise) in corruptions.items()
        for method, column in columns
    )
    return Experiment(
        name="table3",
        scale=scale,
        title="missing input (M, %) and wrong training labels (N, %), full path of 7 blocks (the paper: CIFAR-10)",
        quantity="test accuracy, %",
        data=_data(scale, shift),
        stand_in=True,
        trials=trials,
        published=published.TABLE3,
        notes=(
            "Missing pixels are in training and test data, wrong labels in training data alone.",
            _GUESSES + " What is missing, and how labels are wrong: see `training.corruption`.",
        ),
    )
