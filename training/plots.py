"""Pictures of training, comparisons and tables; those of a family are in `training.diagrams`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display needed, none opened
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

INK, ACCENT, QUIET = "#1f2933", "#c2410c", "#94a3b8"


def plot_history(rows: Sequence[Mapping[str, str]], file: Path) -> None:
    """Validation accuracy over the share of the budget: for each depth, the mean over its watched paths."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    paths = [key for key in rows[0] if key not in ("step", "share", "lr", "loss")]
    depths = sorted({key.count("-") + 1 for key in paths})
    shares = [float(row["share"]) for row in rows]
    for depth in depths:
        members = [key for key in paths if key.count("-") + 1 == depth]
        means = [100 * sum(float(row[key]) for key in members) / len(members) for row in rows]
        colour = plt.get_cmap("plasma")(0.85 * (depth - 1) / max(1, depths[-1] - 1))
        axes.plot(shares, means, marker="o", markersize=3, color=colour, label=f"{depth} block{'s' * (depth > 1)}")
    axes.set(
        xlabel="share of the training budget", ylabel="validation accuracy, %", title="Mean over the paths of each depth"
    )
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    write_figure(figure, file)


def plot_comparison(panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]], title: str, file: Path) -> None:
    """Accuracy over blocks, a panel for each kind of budget: panel -> label -> blocks -> (mean, standard error), 0..1.

    A label has the same colour in all panels; separate networks, whose label begins with `bp`, are dashed and grey.
    """
    labels = dict.fromkeys(label for curves in panels.values() for label in curves if not label.startswith("bp"))
    colours = dict(zip(labels, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    figure, row = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 5), sharey=True, squeeze=False)
    for axes, (name, curves) in zip(row[0], panels.items(), strict=True):
        for label, curve in curves.items():
            depths = sorted(curve)
            axes.errorbar(
                depths,
                [100 * curve[depth][0] for depth in depths],
                yerr=[100 * curve[depth][1] for depth in depths],
                label=label,
                color=colours.get(label, INK if "steps" in label else QUIET),
                linestyle="-" if label in colours else "--",
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=1.4,
            )
        axes.set(xlabel="blocks run", title=name)
        axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)
    row[0][0].set_ylabel("test accuracy, %")
    figure.suptitle(title)
    write_figure(figure, file)


def plot_rows(
    rows: Sequence[str],
    columns: Sequence[str],
    ours: Mapping[tuple[str, str], tuple[float, float]],
    paper: Mapping[tuple[str, str], float],
    title: str,
    quantity: str,
    file: Path,
    least: float | None = None,
) -> None:
    """A table as a picture: (row, column) -> (mean, standard error), filled; the paper's figures as hollow diamonds.

    What is below `least`, if that is given, is cut off.
    """
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    figure, axes = plt.subplots(figsize=(max(7, 1.1 * len(rows)), 4.8))
    for index, column in enumerate(columns):
        colour, aside = colours[index % len(colours)], 0.6 * ((index + 0.5) / len(columns) - 0.5)
        mine = [(rows.index(row) + aside, *value) for (row, name), value in ours.items() if name == column]
        theirs = [(rows.index(row) + aside, value) for (row, name), value in paper.items() if name == column]
        if mine:
            x, means, errors = zip(*mine, strict=True)
            axes.errorbar(x, means, yerr=errors, fmt="o", markersize=5, capsize=2, color=colour, label=column)
        if theirs:
            x, values = zip(*theirs, strict=True)
            label = f"{column}, paper"
            axes.scatter(x, values, marker="D", s=30, facecolor="none", edgecolor=colour, label=label)
    axes.set_xticks(range(len(rows)), rows, rotation=30, ha="right", fontsize="small")
    axes.set(ylabel=quantity, title=title)
    axes.set_ylim(bottom=least)
    axes.grid(axis="y", color=QUIET, alpha=0.3)
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    write_figure(figure, file)


def write_figure(figure: Figure, file: Path) -> None:
    """Write a picture, and free it."""
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
