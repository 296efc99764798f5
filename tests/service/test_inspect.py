"""What `hbll inspect` shows of a bundle."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from family.tree import Tree, format_path
from service.cli import path_table
from tests.fakes import fake_manifest


@pytest.mark.parametrize("width", [80, 120])
def test_paths_can_be_read_on_narrow_terminals(width: int) -> None:
    """Bug found: at 80 columns paths were `1-2-...` and numbers were cut."""
    paths = tuple(Tree(3).paths())
    console = Console(file=io.StringIO(), width=width)
    console.print(path_table(fake_manifest(dict.fromkeys(paths, 0.9312)), "models/digits/1"))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert {format_path(path) for path in paths} <= rows.keys()
    assert all(rows[format_path(path)][1:3] == [str(len(path)), "93.1"] for path in paths)
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
