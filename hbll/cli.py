"""The command line `hbll`: every subcommand is imported when it is called, so a part that is not installed costs
nothing until it is asked for, and is then named."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import click


class _Entry(NamedTuple):
    module: str
    function: str
    extras: str
    help: str


COMMANDS = {
    "train": _Entry("training.cli", "train", "train", "Train a family of subnetworks sharing one set of weights."),
    "evaluate": _Entry("training.cli", "evaluate", "train", "Score every path of a trained family."),
    "compare": _Entry("training.compare_cli", "compare", "train", "Compare training methods over seeds: table, CSV, plot."),
    "reproduce": _Entry(
        "training.reproduce", "reproduce", "train", "Repeat the paper's experiments, its figures beside ours."
    ),
    "export": _Entry("export.cli", "export", "export,train,cpu", "Write a trained family as a bundle of ONNX graphs."),
    "inspect": _Entry("service.cli", "inspect", "cpu", "Show what is in a bundle."),
    "verify": _Entry("export.cli", "verify", "export,train,cpu", "Compare all graphs of a bundle, and the checkpoint."),
    "serve": _Entry("service.cli", "serve", "cpu", "Serve a folder of models over HTTP."),
    "keys": _Entry("service.keys_cli", "keys", "cpu", "Make, list and remove API keys."),
    "predict": _Entry("hbll.predict", "predict", "cpu", "Ask a running server about images or tables."),
    "load": _Entry("benchmarks.service_level", "main", "cpu", "Load a running server: at which rates are budgets kept?"),
    "simulate": _Entry("benchmarks.simulate", "main", "cpu,train", "Compare scheduling policies in simulated time."),
    "bench": _Entry("benchmarks.bench", "main", "cpu,train", "Compare scheduling policies on real servers."),
    "bench-training": _Entry("benchmarks.training", "main", "train", "Time, span and memory of a step of HBLL and of BP."),
}


class _LazyGroup(click.Group):
    """Lists all subcommands without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        try:
            command = getattr(importlib.import_module(entry.module), entry.function)
        except ModuleNotFoundError as exc:
            raise click.ClickException(
                f"`hbll {cmd_name}` needs the package {exc.name!r}, which is not installed here: "
                f"pip install 'hbll-anytime[{entry.extras}]'"
            ) from exc
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hbll-anytime")
def main() -> None:
    """Anytime inference: one model, trained as a family of depths, served within each request's budget.

    \b
    The whole way, on real digits:
      hbll train --out runs/digits
      hbll export runs/digits models/digits/1
      hbll serve models --port 8000
      hbll predict digit.png --budget-ms 5
    """
