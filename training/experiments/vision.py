"""Tables 3, 7 and 8: Vision Transformers of D = 3, one family against separately trained networks of the same blocks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from family.tree import Tree, format_path
from training.config import MethodName, RunConfig, TrainConfig, VitConfig
from training.data_config import DataConfig, DigitsConfig, PublishedConfig
from training.experiments import published
from training.experiments.experiment import Experiment, Scale
from training.experiments.families import FamilyTrial, Reading, run_config
from training.experiments.source import describe, images
from training.methods import METHODS

EPOCHS = {"smoke": 1, "small": 10, "paper": 500}
_AS_PUBLISHED = {"shift": 4, "flip": True, "rand_augment": 9}
_GUESSES = (
    "Guessed: the width and heads of the ViT and its patches; warm-up of 100 steps and a cosine to zero; RandAugment's two "
    "operations and magnitude of 9, at scale paper. HBLL is `hbll-paper`: latent losses summed over features, c = 1/4."
)


def _model(scale: Scale) -> VitConfig:
    sizes: dict[Scale, dict[str, int]] = {
        "smoke": {"patch": 14, "width": 8, "heads": 2, "hidden": 16},
        "paper": {"patch": 4, "width": 384, "heads": 6, "hidden": 1536},
    }
    return VitConfig(hierarchy_depth=3, exit_heads=False, **sizes.get(scale, {}))


def _config(scale: Scale, method: MethodName, data: DataConfig, noise: float, **settings: object) -> RunConfig:
    settings = {"epochs": EPOCHS[scale], "noise": noise if method == "hbll-paper" else 0.0} | settings
    settings |= {"batch": 256, "lr": 5e-4} if scale == "paper" else {"batch": 32, "lr": 4e-3}
    return run_config(_model(scale), data, method, **settings)  # type: ignore[arg-type]


def _data(scale: Scale, data: DataConfig) -> str:
    config = _config(scale, "hbll", data, 0.0)
    model = _model(scale)
    moved = (
        f", moved by up to {data.shift} pixels" if isinstance(data, DigitsConfig | PublishedConfig) and data.shift else ""
    )
    mirrored = ", mirrored, and distorted by RandAugment" if isinstance(data, PublishedConfig) else ""
    return (
        f"{describe(data)}{moved}{mirrored}; ViT of width {model.width}, "
        f"patches of {model.patch} x {model.patch}, {EPOCHS[scale]} epoch(s), batch {config.train.batch}, "
        f"AdamW {config.train.lr:g}."
    )


def _by_depth(
    name: str, scale: Scale, data: DataConfig, top: int, noise: float, figures: published.Figures, title: str
) -> Experiment:
    """A family on the four paths of the table, and networks of as many blocks; all with equal epochs, one also with equal
    work."""
    tree = Tree(3)
    paths = dict(zip(published.LADDER_AND_FULL, map(format_path, (*tree.ladder, tree.full)), strict=True))

    def trial(method: MethodName, column: str, names: Iterable[str], **settings: object) -> FamilyTrial:
        return FamilyTrial(
            name=f"{method}{settings.get('blocks', '')}",
            config=_config(scale, method, data, noise, **settings),
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
        trial("hbll+chains", "`hbll+chains`, equal work", paths, epochs=work / of_an_epoch, chains=1),
    )
    return Experiment(
        name=name,
        scale=scale,
        title=title,
        quantity=f"test accuracy, % (top {top})" if top > 1 else "test accuracy, %",
        data=_data(scale, data),
        stand_in=scale != "paper",
        trials=trials,
        published=figures,
        notes=(
            "BP: one network for each row. HBLL: one family, as many epochs as each of those networks. Equal work: as many "
            "block evaluations as those networks together.",
            _GUESSES,
        ),
    )


def table7(scale: Scale, folder: Path | None) -> Experiment:
    """CIFAR-10; below scale paper the digits."""
    data = images("table7", scale, folder, DigitsConfig(shift=2), **_AS_PUBLISHED)
    return _by_depth("table7", scale, data, 1, 0.005, published.TABLE7, "a ViT family by depth (the paper: CIFAR-10)")


def table8(scale: Scale, folder: Path | None) -> Experiment:
    """Top 5 of CIFAR-100's classes; below scale paper the top 2 of ten digits."""
    data = images("table8", scale, folder, DigitsConfig(shift=2), **_AS_PUBLISHED)
    top = 5 if scale == "paper" else 2
    title = "a ViT family by depth (the paper: top 5 of CIFAR-100)"
    return _by_depth("table8", scale, data, top, 0.002, published.TABLE8, title)


def table3(scale: Scale, folder: Path | None) -> Experiment:
    """Missing input and label noise: the full path of an HBLL family against backpropagation through as many blocks."""
    tree = Tree(3)
    full = format_path(tree.full)
    columns: tuple[tuple[MethodName, str], ...] = ("bp", published.BP), ("hbll-paper", published.HBLL), ("hbll", "`hbll`")

    def data(missing: float, label_noise: float) -> DataConfig:
        digits = DigitsConfig(shift=0, missing=missing, label_noise=label_noise)
        return images("table3", scale, folder, digits, **_AS_PUBLISHED, missing=missing, label_noise=label_noise)

    corruptions = {"clean": (0.0, 0.0), "M50": (0.5, 0.0)} if scale == "smoke" else published.CORRUPTIONS
    trials = tuple(
        FamilyTrial(
            name=f"{row}-{method}",
            config=_config(
                scale,
                method,
                data(missing, label_noise),
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
        data=_data(scale, data(0.0, 0.0)),
        stand_in=scale != "paper",
        trials=trials,
        published=published.TABLE3,
        notes=(
            "Missing pixels are in training and test data, wrong labels in training data alone.",
            _GUESSES + " What is missing, and how labels are wrong: see `training.corruption`.",
        ),
    )
