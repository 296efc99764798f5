"""The paper's figures (arXiv 2606.21497v1), by (row, column) of our tables. Nothing here was measured by us."""

from __future__ import annotations

Figures = dict[tuple[str, str], float]

BP, CFFM, HBLL = "BP", "CFF+M", "HBLL"
SEQ, TREE, BPTT = "seq", "tree", "BPTT"
LADDER_AND_FULL = {"0-4-8": 1, "0-4-6-8": 2, "0-4-6-7-8": 3, "0-1-...-8": 7}
"""The four paths of Tables 7, 8 and 9 (D = 3) and their numbers of blocks."""


def mlp_row(hierarchy_depth: int, hidden: int) -> str:
    """A row of Table 1."""
    return f"D={hierarchy_depth}, hidden {hidden}"


def path_row(path: str) -> str:
    """A row of Tables 7, 8 and 9."""
    blocks = LADDER_AND_FULL[path]
    return f"{path} ({blocks} block{'s' * (blocks > 1)})"


def rnn_row(task: str, cell: str, hierarchy_depth: int) -> str:
    """A row of Table 6: `task` sMNIST or psMNIST, `cell` gru or elman."""
    return f"{task}, {'GRU' if cell == 'gru' else 'Elman'}, D={hierarchy_depth}"


def _by_path(bp: tuple[float, ...], hbll: tuple[float, ...]) -> Figures:
    rows = [path_row(path) for path in LADDER_AND_FULL]
    return {(row, BP): value for row, value in zip(rows, bp, strict=True)} | {
        (row, HBLL): value for row, value in zip(rows, hbll, strict=True)
    }


_TABLE1 = {
    2: ((96.68, 97.29, 97.98), (94.30, 94.90, 95.80), (97.20, 97.66, 98.32)),
    3: ((95.37, 96.82, 96.39), (94.15, 94.89, 96.03), (97.08, 97.60, 98.02)),
    4: ((11.32, 11.32, 11.32), (94.22, 94.65, 96.00), (94.76, 95.52, 97.09)),
}
HIDDEN = 50, 100, 500
TABLE1: Figures = {
    (mlp_row(depth, hidden), column): value
    for depth, columns in _TABLE1.items()
    for column, values in zip((BP, CFFM, HBLL), columns, strict=True)
    for hidden, value in zip(HIDDEN, values, strict=True)
}

CORRUPTIONS = {
    "clean": (0.0, 0.0),
    "M50": (0.5, 0.0),
    "M80": (0.8, 0.0),
    "N20": (0.0, 0.2),
    "N40": (0.0, 0.4),
}
"""The rows of Table 3: shares of the input missing and of the labels wrong."""
_TABLE3 = zip(CORRUPTIONS, (88.98, 82.51, 69.75, 79.55, 71.85), (87.30, 83.12, 74.77, 80.17, 72.70), strict=True)
TABLE3: Figures = {}
for _row, _bp, _hbll in _TABLE3:
    TABLE3 |= {(_row, BP): _bp, (_row, HBLL): _hbll}

TABLE6: Figures = {}
for _task, _cell, _depth, *_values in (
    ("sMNIST", "gru", 8, 97.7, 98.7, 98.6),
    ("psMNIST", "gru", 8, 95.1, 98.7, 95.3),
    ("sMNIST", "elman", 6, 98.0, 98.7, 97.9),
    ("psMNIST", "elman", 6, 97.2, 98.4, 97.0),
):
    TABLE6 |= {(rnn_row(_task, _cell, _depth), name): value for name, value in zip((SEQ, TREE, BPTT), _values, strict=True)}

TABLE7 = _by_path((77.99, 84.53, 86.86, 88.98), (78.58, 86.19, 87.57, 87.30)) | {(path_row("0-1-...-8"), CFFM): 85.37}
TABLE8 = _by_path((82.62, 85.55, 85.95, 85.96), (82.43, 86.20, 85.76, 86.09)) | {(path_row("0-1-...-8"), CFFM): 84.29}
TABLE9 = _by_path((32.78, 23.41, 20.99, 18.17), (34.22, 24.08, 21.98, 22.22))
"""Perplexity on WikiText-103."""

FIG3: Figures = {("D=6", HBLL): 1.7, ("D=7", HBLL): 2.6, ("D=8", HBLL): 3.6}
"""Speed-up per epoch over BPTT; the paper's figure shows below 1 up to D = 5."""
