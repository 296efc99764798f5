"""`hbll bench-training`: what a step of HBLL costs beside one of backpropagation, over the number of blocks.

Three ways to train all N-1 blocks by one batch: backpropagation through the full path, HBLL node by node, and HBLL with a
batched call per level. Each is a whole step: gradients to zero, forward, backward, AdamW. They take turns, so that what
else the machine does meets all alike; medians are reported, and ratios of medians.
"""

from __future__ import annotations

import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from benchmarks.records import write_csv
from benchmarks.span import counted
from training.blocks import StackedBlocks, Weights
from training.checkpoint import write_atomically
from training.config import ModelConfig, ResMlpConfig, VitConfig
from training.distributed import gradient_buffer
from training.model import Family, build_family
from training.objective import hbll_step
from training.plots import ACCENT, INK, QUIET

BP, NODE, LEVEL = "BP", "HBLL, node by node", "HBLL, level-batched"
WAYS = {BP: INK, NODE: QUIET, LEVEL: ACCENT}

MODELS: dict[str, tuple[ModelConfig, int]] = {
    "narrow residual MLP": (ResMlpConfig(width=16, hidden=32), 32),
    "residual MLP": (ResMlpConfig(width=64, hidden=128), 64),
    "ViT": (VitConfig(exit_heads=False), 32),
}
"""Name -> model and batch: from steps that are all calls to steps that are all arithmetic."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way to train one family. `step_s`: median seconds of a step; `span`: block evaluations one after the other,
    forward and backward; `dependent`: of these, those that need the one before; `peak_bytes`: allocated at once by a step
    beyond weights, gradients and the optimizer's state."""

    model: str
    hierarchy_depth: int
    blocks: int
    way: str
    step_s: float
    span: int
    dependent: int
    peak_bytes: int


class _Network(nn.Module):
    """All blocks of a family as one ordinary network, every block with tensors of its own: what BP is fastest on."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        assert isinstance(family.blocks, StackedBlocks)
        self.embed: nn.Module = family.embed
        self.head: nn.Module = family.head
        self.run: Callable[[Weights, Tensor], Tensor] = family.blocks.run
        stacks = dict(family.blocks.named_parameters())
        self.weights = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(stack[block].detach().clone()) for name, stack in stacks.items()})
            for block in range(family.blocks.count)
        )
        self.blocks: list[Weights] = [dict(weights.named_parameters()) for weights in self.weights]

    def forward(self, x: Tensor) -> Tensor:
        """Logits, `(batch, classes)`."""
        state = self.embed(x)
        for weights in self.blocks:
            state = self.run(weights, state)
        logits: Tensor = self.head(state)
        return logits


class Bench:
    """One family, one batch, and the three ways."""

    def __init__(self, config: ModelConfig, batch: int, hierarchy_depth: int, device: torch.device) -> None:
        # Past what a configuration allows: there are too many paths to score from D = 5 on, and nobody scores them here.
        config = config.model_copy(update={"hierarchy_depth": hierarchy_depth})
        self.family = build_family(config, seed=0).to(device)
        self.network = _Network(build_family(config, seed=0)).to(device)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.rand(batch, 28, 28, generator=generator).to(device)
        self.y = torch.randint(0, 10, (batch,), generator=generator).to(device)
        self.gradients = gradient_buffer(self.family)
        modules = {BP: self.network, NODE: self.family, LEVEL: self.family}
        self.optimizers = {
            way: torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True) for way, module in modules.items()
        }
        self.device = device
        # One thread's own CPU time, where that is all, does not count what else the machine does meanwhile.
        self._clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def losses(self, way: str) -> None:
        """Forward and backward; gradients add up."""
        if way == BP:
            F.cross_entropy(self.network(self.x), self.y).backward()
        else:
            at_once = 1 if way == NODE else None
            hbll_step(self.family, self.x, self.y, nudge=0.5, noise=0, generator=torch.Generator(), at_once=at_once)

    def seconds(self, way: str) -> float:
        """Of one whole step."""
        self._wait()
        start = self._clock()
        if way == BP:
            self.network.zero_grad()
        else:
            self.gradients.zero_()
        self.losses(way)
        self.optimizers[way].step()
        self._wait()
        return self._clock() - start

    def peak_bytes(self, way: str) -> int:
        """The most that forward and backward hold at once beyond weights and gradients, as torch's allocator sees it."""
        self.losses(way)  # from now on there are gradients to add to
        if self.device.type == "cuda":
            self._wait()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.losses(way)
            self._wait()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
            self.losses(way)
        assert profile.profiler is not None
        assert profile.profiler.kineto_results is not None
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def span_of(hierarchy_depth: int, way: str) -> tuple[int, int]:
    """(in order, dependent) of a step at D, counted on a small family: it does not depend on the blocks."""
    bench = Bench(ResMlpConfig(width=4, hidden=4), 2, hierarchy_depth, torch.device("cpu"))
    blocks, head = (bench.network, bench.network.head) if way == BP else (bench.family.blocks, bench.family.head)
    with counted(blocks, head) as span:
        bench.losses(way)
    return span.in_order, span.dependent


def measure(model: str, hierarchy_depth: int, rounds: int, device: torch.device) -> list[Row]:
    """All ways on one family: a round for warming up, then `rounds` in which they take turns."""
    config, batch = MODELS[model]
    bench = Bench(config, batch, hierarchy_depth, device)
    times = [{way: bench.seconds(way) for way in WAYS} for _ in range(rounds + 1)][1:]
    return [
        Row(
            model,
            hierarchy_depth,
            bench.family.blocks.count,
            way,
            statistics.median(of_round[way] for of_round in times),
            *span_of(hierarchy_depth, way),
            bench.peak_bytes(way),
        )
        for way in WAYS
    ]


def markdown(rows: Sequence[Row], rounds: int, machine: str) -> str:
    """The report's tables, with what one must know to read them."""
    about = (
        f"On {machine}. Medians of {rounds} steps (gradients to zero, forward, backward, AdamW), the ways taking turns; "
        "ratios are BP's median by the other's: above 1 is faster than BP. Span: block evaluations, forward and backward, "
        "that come one after the other, a batched call counting 1 and the head running beside the right parents; counted "
        "in the run, not from the formulas 2N and 4D; in brackets those of them that need the one before. Peak: bytes that "
        "a step's forward and backward hold at once beyond weights, gradients and optimizer state, as torch's allocator "
        "counts them."
    )
    columns = [
        f"{what} {way}" for what in ("ms,", "faster,", "peak MB,") for way in ("BP", "node by node", "level-batched")
    ]
    columns.remove("faster, BP")
    header = ["model", "D", "blocks", *columns[:5], "span BP", "span HBLL", *columns[5:]]
    lines = ["# A training step over the number of blocks", "", textwrap.fill(about, 120), "", _line(header)]
    lines.append(_line(["---", *["--:"] * (len(header) - 1)]))
    for bp, node, level in _by_family(rows):
        ways = (bp, node, level)
        cells = [bp.model, str(bp.hierarchy_depth), str(bp.blocks), *(f"{1e3 * way.step_s:.1f}" for way in ways)]
        cells += [f"{bp.step_s / way.step_s:.2f}" for way in (node, level)]
        cells += [f"{way.span} ({way.dependent})" for way in (bp, level)]
        lines.append(_line([*cells, *(f"{way.peak_bytes / 1e6:.1f}" for way in ways)]))
    return "\n".join([*lines, ""])


def plot(rows: Sequence[Row], title: str, file: Path) -> None:
    """Over blocks: a column for each model, with the time of a step, its peak memory, and its span."""
    models = list(dict.fromkeys(row.model for row in rows))
    quantities: dict[str, Callable[[Row], float]] = {
        "step, ms": lambda row: 1e3 * row.step_s,
        "peak, MB": lambda row: row.peak_bytes / 1e6,
        "span, block evaluations": lambda row: row.span,
    }
    figure, grid = plt.subplots(len(quantities), len(models), figsize=(4 * len(models), 9), sharex=True, squeeze=False)
    for column, model in enumerate(models):
        for axes, (label, of) in zip(grid[:, column], quantities.items(), strict=True):
            for way, colour in WAYS.items():
                mine = [row for row in rows if row.model == model and row.way == way]
                axes.plot([row.blocks for row in mine], [of(row) for row in mine], marker="o", color=colour, label=way)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_ylabel(label)
        grid[0, column].set_title(model)
        grid[-1, column].set_xlabel("blocks")
    grid[0, 0].legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _by_family(rows: Sequence[Row]) -> list[tuple[Row, Row, Row]]:
    found = {(row.model, row.hierarchy_depth, row.way): row for row in rows}
    families = dict.fromkeys((row.model, row.hierarchy_depth) for row in rows)
    return [(found[*family, BP], found[*family, NODE], found[*family, LEVEL]) for family in families]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _depths(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        depths = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as exc:
        raise click.BadParameter(f"expected numbers with commas between them, got {text!r}") from exc
    if not all(1 <= depth <= 8 for depth in depths):
        raise click.BadParameter(f"hierarchy depths must be in 1..8, got {text}")
    return depths


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("docs/bench-training"), show_default=True
)
@click.option(
    "--depths", default="3,4,5,6", show_default=True, callback=_depths, help="D, with commas between; 2**D - 1 blocks."
)
@click.option("--models", type=click.Choice(list(MODELS)), multiple=True, help="Can be repeated.  [default: all]")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Steps of each way, taking turns."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads of one operation.")
@click.option("--machine", default="this machine", help="What the report calls it.")
def main(
    out: Path, depths: tuple[int, ...], models: tuple[str, ...], rounds: int, device: str, threads: int, machine: str
) -> None:
    """Time, span and peak memory of a training step: HBLL level by level, node by node, and backpropagation.

    Writes training.md, training.csv and training.png into --out.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("there is no GPU that torch can use: leave --device at cpu")
    torch.set_num_threads(threads)
    rows: list[Row] = []
    for model in models or MODELS:
        for depth in depths:
            found = measure(model, depth, rounds, torch.device(device))
            rows += found
            click.echo(f"{model}, D={depth}: " + ", ".join(f"{row.way} {1e3 * row.step_s:.1f} ms" for row in found))
    out.mkdir(parents=True, exist_ok=True)
    place = device if device == "cuda" else "one thread's CPU time" if threads == 1 else f"{threads} CPU threads"
    where = f"{machine}, {place}"
    write_atomically(out / "training.md", markdown(rows, rounds, where).encode())
    write_csv(out / "training.csv", list(asdict(rows[0])), (asdict(row).values() for row in rows))
    plot(rows, f"A training step on {where}", out / "training.png")
    click.echo(f"wrote training.md, training.csv and training.png in {out}")
