from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.records import write_csv


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    write_csv(file, ["cell", "share"], [["Poisson, 0.2 C", 0.5]])
    assert file.read_bytes() == b'cell,share\n"Poisson, 0.2 C",0.5\n'

    def rows():
        yield [1, 2]
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        write_csv(file, ["cell", "share"], rows())
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert file.read_bytes().startswith(b'cell,share\n"Poisson')
