"""Text as numbers: where it comes from, its three splits, bytes or byte-pair tokens, and windows of them.

The embedded text is the documentation of Python's own help(), English prose with some code, which every Python has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor

from training.checkpoint import write_atomically
from training.config import ConfigError

SPLITS = "train", "validation", "test"
_SHARES = 0.9, 0.05
"""Of train and validation, where the text comes in one piece."""
_TOPICS_SEED = 20260619
_FILE_MARKS = {"train": "train", "validation": "valid", "test": "test"}


@dataclass(frozen=True, slots=True)
class Text:
    """The text of the three splits, and what it is."""

    description: str
    train: str
    validation: str
    test: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens `(length,) int64` of a split; `bytes_each`: bytes of text for each, on average."""

    ids: Tensor
    bytes_each: float

    def windows(self, context: int, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """`count` random windows: tokens `(count, context)`, and the next token of every position `(count * context,)`."""
        starts = torch.from_numpy(rng.integers(0, len(self.ids) - context, count))
        windows = self.ids[starts[:, None] + torch.arange(context + 1)]
        return windows[:, :-1], windows[:, 1:].flatten()

    def all_windows(self, context: int, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows one after the other, `at_once` in a batch, each as of `windows`; what does not fill one is left out."""
        count = (len(self.ids) - 1) // context
        inputs = self.ids[: count * context].reshape(count, context)
        targets = self.ids[1 : count * context + 1].reshape(count, context)
        for first in range(0, count, at_once):
            yield inputs[first : first + at_once], targets[first : first + at_once].flatten()


@dataclass(frozen=True, slots=True)
class Corpus:
    """The three splits as tokens of one vocabulary."""

    vocabulary: int
    train: Tokens
    validation: Tokens
    test: Tokens


def embedded_text() -> Text:
    """The topics of `help()`, shuffled once, so that every split has a bit of everything; the text is this Python's."""
    names = np.random.default_rng(_TOPICS_SEED).permutation(sorted(topics))
    text = "\n\n".join(topics[name] for name in names)
    return _cut(text, f"the topics of Python's help(), {len(text.encode()):,} bytes")


def read_text(folder: Path) -> Text:
    """The text files (`.txt`, `.raw`, `.tokens`, `.md`) of a folder, in the order of their names.

    Where some are named for the splits (`wiki.train.raw`, `wiki.valid.raw`, `wiki.test.raw`), those are the splits; else
    their text is cut 90 / 5 / 5.

    Raises:
        ConfigError: there are no such files, a split is missing, or one is not UTF-8.
    """
    suffixes = {".txt", ".raw", ".tokens", ".md"}
    files = sorted(file for file in folder.glob("*") if file.suffix in suffixes and file.is_file())
    if not files:
        raise ConfigError(f"{folder} holds no text: expected files that end in {', '.join(sorted(suffixes))}")
    by_split = {name: [file for file in files if mark in file.name] for name, mark in _FILE_MARKS.items()}
    if not any(by_split.values()):
        return _cut(_join(files), f"{len(files)} text file(s)")
    if empty := [name for name, members in by_split.items() if not members]:
        raise ConfigError(
            f"{folder} has files for some splits and none for {', '.join(empty)}: name them *train*, *valid* and *test*, "
            "or none of them so"
        )
    return Text(f"{len(files)} text file(s)", **{name: _join(members) for name, members in by_split.items()})


def encode(text: Text, vocabulary: int | None, tokenizer_file: Path) -> Corpus:
    """As bytes (`vocabulary` none), or as byte-pair tokens of a tokenizer that is trained on the training text.

    `tokenizer_file` keeps that tokenizer, and is read if it is there.

    Raises:
        ConfigError: byte-pair tokens are wanted, and the package for them is not installed.
    """
    if vocabulary is None:
        splits = (np.frombuffer(getattr(text, name).encode(), np.uint8).astype(np.int64) for name in SPLITS)
        return Corpus(256, *(Tokens(torch.from_numpy(ids), 1.0) for ids in splits))
    try:
        from tokenizers import ByteLevelBPETokenizer, Tokenizer
    except ModuleNotFoundError as exc:
        raise ConfigError("byte-pair tokens need the package tokenizers: pip install 'hbll-anytime[text]'") from exc
    if not tokenizer_file.exists():
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(text.train.splitlines(keepends=True), vocab_size=vocabulary, show_progress=False)
        write_atomically(tokenizer_file, trained.to_str().encode())
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokens = []
    for name in SPLITS:
        split: str = getattr(text, name)
        ids = tokenizer.encode(split).ids
        tokens.append(Tokens(torch.tensor(ids), len(split.encode()) / len(ids)))
    return Corpus(tokenizer.get_vocab_size(), *tokens)


def _cut(text: str, description: str) -> Text:
    first, second = (round(len(text) * share) for share in (_SHARES[0], sum(_SHARES)))
    return Text(description, text[:first], text[first:second], text[second:])


def _join(files: list[Path]) -> str:
    try:
        return "\n".join(file.read_text(encoding="utf-8") for file in files)
    except UnicodeDecodeError as exc:
        raise ConfigError(f"a text file is not UTF-8: {exc}") from exc
