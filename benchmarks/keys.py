"""Whether the time of a check tells a wrong token from a known one, or whose it is: measured, not asserted.

    python -m benchmarks.keys

Tokens are checked in turn, in a new random order each round, so that whatever else the machine does meets all alike. Each
kind is told by its median and compared with wrong tokens by how often it takes longer (0.5: no difference; ties count
half), with the interval in which 95 % of such shares would lie if times were independent and there were no difference. The
control, wrong tokens against wrong tokens, says how far off they are by themselves here. A whole check takes longer if the
token is wrong, by the exception; that tells no more than the 401 does.
"""

from __future__ import annotations

import gc
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import mannwhitneyu

from service.errors import Unauthorized
from service.keyring import add_key, digest_of, read_keys
from service.keys import Keys, find_key

WRONG = "wrong"


@click.command()
@click.option("--keys", "count", default=100, show_default=True, help="Keys in the file.")
@click.option("--rounds", default=20_000, show_default=True, help="Checks of each kind.")
def main(count: int, rounds: int) -> None:
    """Time checks of wrong tokens, and of the first, middle and last key's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.toml"
        tokens = [add_key(file, f"key{number}", rate=None, admin=False) for number in range(count)]
        known, keys = read_keys(file), Keys(file)
    close = tokens[0][:-1] + ("A" if tokens[0][-1] != "A" else "B")
    kinds = {WRONG: "", "wrong, as a control": "", "wrong by its last character": close}
    kinds |= {"the first's": tokens[0], "the middle one's": tokens[count // 2], "the last's": tokens[-1]}
    asked = {kind: [token or f"hbll_{secrets.token_urlsafe(32)}" for _ in range(rounds)] for kind, token in kinds.items()}
    digests = {kind: [digest_of(token) for token in each] for kind, each in asked.items()}
    table = Table(title=f"{count} keys, {rounds} checks of each kind")
    for column in ("token", "comparing, us", "longer than wrong", "95 % if no different", "whole check, us"):
        table.add_column(column, justify="left" if column == "token" else "right")
    compared: dict[str, list[int]] = {kind: [] for kind in kinds}
    whole: dict[str, list[int]] = {kind: [] for kind in kinds}
    random = np.random.default_rng(0)
    gc.disable()
    for number in range(rounds):
        for kind in random.permutation(list(kinds)).tolist():
            digest, token = digests[kind][number], asked[kind][number]
            begun = time.perf_counter_ns()
            find_key(known, digest)
            compared[kind].append(time.perf_counter_ns() - begun)
            begun = time.perf_counter_ns()
            with suppress(Unauthorized):
                keys.check(token)
            whole[kind].append(time.perf_counter_ns() - begun)
    spread = 1.96 * np.sqrt((2 * rounds + 1) / (12 * rounds * rounds))
    for kind in kinds:
        share = mannwhitneyu(compared[kind], compared[WRONG]).statistic / rounds**2
        table.add_row(
            kind,
            f"{np.median(compared[kind]) / 1000:.2f}",
            "" if kind == WRONG else f"{share:.4f}",
            "" if kind == WRONG else f"{0.5 - spread:.4f} to {0.5 + spread:.4f}",
            f"{np.median(whole[kind]) / 1000:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
