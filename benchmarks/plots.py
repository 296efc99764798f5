"""The pictures of the comparison of policies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from service.policy import DEFAULT_POLICY

if TYPE_CHECKING:
    from benchmarks.live import Measured
    from benchmarks.simulate import Played

_PANELS = (("poisson", 1), ("bursts", 4), ("bursts", 8))


def draw_loads(file: Path, played: Sequence[Played]) -> None:
    """Share answered correctly and in time, and share in time, against the load, for each policy."""
    deadlines = sorted({each.job.cell.deadline for each in played})
    policies = list(dict.fromkeys(each.job.policy for each in played))
    figure, axes = plt.subplots(
        2 * len(deadlines), len(_PANELS), figsize=(13, 5.2 * len(deadlines)), sharex=True, sharey="row", squeeze=False
    )
    for row, (deadline, what) in enumerate((d, w) for d in deadlines for w in ("goodput", "attainment")):
        for column, (kind, cv2) in enumerate(_PANELS):
            panel = axes[row][column]
            here = [p for p in played if (p.job.cell.kind, p.job.cell.cv2, p.job.cell.deadline) == (kind, cv2, deadline)]
            loads = sorted({each.job.cell.load for each in here})
            for policy in policies:
                values = [
                    100 * np.mean([getattr(p, what) for p in here if p.job.policy == policy and p.job.cell.load == load])
                    for load in loads
                ]
                ours = policy == DEFAULT_POLICY
                panel.plot(
                    loads, values, marker="o" if ours else ".", lw=2.4 if ours else 1, label=policy, zorder=3 if ours else 2
                )
            if what == "goodput":
                bounds = [[p.bound for p in here if p.job.cell.load == load and p.bound == p.bound] for load in loads]
                if all(bounds):
                    panel.plot(loads, [100 * np.mean(each) for each in bounds], "k:", label="upper bound")
            panel.grid(alpha=0.3)
            name = "Poisson" if kind == "poisson" else f"bursts, CV² {cv2}"
            panel.set_title(f"{name}, deadline {deadline} L", fontsize=10)
            if column == 0:
                panel.set_ylabel("correct and in time, %" if what == "goodput" else "in time, %")
    for panel in axes[-1]:
        panel.set_xlabel("load, C")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_burst(file: Path, measured: Measured, width_s: float) -> None:
    """The depths of the answers over time, and what arrived: one replay of the live server."""
    edges = np.arange(0, measured.scheduled_s[-1] + width_s, width_s)
    figure, (rate, mix) = plt.subplots(2, 1, figsize=(10, 5.5), sharex=True)
    counts, _ = np.histogram(measured.scheduled_s, edges)
    rate.step(edges[:-1], counts / width_s, where="post")
    rate.set_ylabel("arrivals/s")
    depths = sorted(set(measured.depth.tolist()))
    shares = []
    for depth in depths:
        answered, _ = np.histogram(measured.scheduled_s[measured.depth == depth], edges)
        shares.append(100 * answered / np.maximum(counts, 1))
    labels = ["no answer" if depth == 0 else f"{depth} block{'s' * (depth > 1)}" for depth in depths]
    mix.stackplot(
        edges[:-1], shares, labels=labels, step="post", colors=plt.get_cmap("viridis")(np.linspace(0, 1, len(depths)))
    )
    mix.set_ylabel("answers, %")
    mix.set_xlabel("seconds")
    mix.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_anytime(
    file: Path, points: Sequence[tuple[str, float, float]], curves: dict[str, Sequence[tuple[float, float]]]
) -> None:
    """Accuracy against milliseconds: paths as `(name, ms, accuracy)`, and curves of climbing rules."""
    figure, panel = plt.subplots(figsize=(8, 5))
    for name, ms, accuracy in points:
        panel.plot(ms, 100 * accuracy, "o", color="tab:blue", zorder=3)
        panel.annotate(name, (ms, 100 * accuracy), textcoords="offset points", xytext=(5, -10), fontsize=8)
    for name, curve in curves.items():
        x, y = zip(*curve, strict=True)
        panel.plot(x, 100 * np.array(y), label=name)
    panel.set_xlabel("mean milliseconds of inference, batch 1")
    panel.set_ylabel("test accuracy, %")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
