"""Text as numbers: where it comes from, its three splits, bytes or byte-pair tokens, and windows of them.

The embedded text is the documentation of Python's own help(), English prose with some code, which every Python has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor

from training.checkpoint import write_atomically
from training.config import ConfigError
from training.data_config import TextConfig
from training.dataset import DataError, Dataset, DataSpec, Split
from training.publications import TEXTS, read_wikitext

SPLITS = "train", "validation", "test"
_SHARES = 0.9, 0.05
"""Of train and validation, where the text comes in one piece."""
_TOPICS_SEED = 20260619
WINDOWS = 1000
"""Rows of a split, at most, where windows are rows; those of a short text overlap."""
BYTE_LABELS = tuple(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in range(256))
"""A byte as text: itself if it is printable ASCII, else as in `\\x0a`."""
_FILE_MARKS = {"train": {"train", "training"}, "validation": {"valid", "validation"}, "test": {"test", "testing"}}
"""Words in the name of a file that is of one split."""


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
    """The three splits as tokens of one vocabulary; `labels` are its tokens as text, each another."""

    labels: tuple[str, ...]
    train: Tokens
    validation: Tokens
    test: Tokens

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return len(self.labels)


def load_windows(config: TextConfig) -> Dataset:
    """Windows of each split as rows, and the token after each as its label: at most `WINDOWS` of them, evenly spaced.

    No rows are for certification, which is for rows that are drawn independently: windows of one text are not.

    Raises:
        DataError: there is no text, a split is shorter than a window, or there is no such tokenizer.
    """
    if config.tokenizer is not None and not config.tokenizer.is_file():
        raise DataError(f"{config.tokenizer} does not exist: expected the tokenizer that the run in its folder trained")
    try:
        text = text_of(config.folder)
        corpus = encode(text, None if config.tokenizer is None else 0, config.tokenizer or Path())
    except ConfigError as exc:
        raise DataError(str(exc)) from exc
    splits = {name: _evenly(getattr(corpus, name), config.context, f"{text.description}, {name}") for name in SPLITS}
    train, validation, test = splits.values()
    nothing = Split(train.x[:0], train.labels[:0])
    return Dataset(train, validation, nothing, test, spec=windows_spec(text, corpus, config.context), source=config)


def windows_spec(text: Text, corpus: Corpus, context: int) -> DataSpec:
    """What `load_windows` gives, as a model has to know it."""
    return DataSpec(
        description=f"text: {text.description}", input_shape=(context,), labels=corpus.labels, vocabulary=corpus.vocabulary
    )


def _evenly(tokens: Tokens, context: int, name: str) -> Split:
    last = len(tokens.ids) - context - 1  # where a window may start at the latest
    if last < 0:
        raise DataError(f"{name}: expected more than {context} tokens, got {len(tokens.ids)}")
    starts = torch.linspace(0, last, min(WINDOWS, last + 1)).long()
    windows = tokens.ids[starts[:, None] + torch.arange(context + 1)]
    return Split(windows[:, :-1], windows[:, -1])


def text_of(folder: Path | None) -> Text:
    """The embedded text, WikiText-103 if its archive is in `folder`, or the text files there.

    Raises:
        ConfigError: there are none that can be used.
        DataError: the archive is not the published one.
    """
    if folder is None:
        return embedded_text()
    wikitext = TEXTS["wikitext103"]
    if any((folder / name).exists() for name in wikitext.files):
        return Text(wikitext.title, *read_wikitext(folder))
    return read_text(folder)


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
        ConfigError: there are no such files, a split is missing, a file is named for two, or one is not UTF-8.
    """
    suffixes = {".txt", ".raw", ".tokens", ".md"}
    files = sorted(file for file in folder.glob("*") if file.suffix in suffixes and file.is_file())
    if not files:
        raise ConfigError(f"{folder} holds no text: expected files that end in {', '.join(sorted(suffixes))}")
    description = f"{len(files)} text file(s), {sum(file.stat().st_size for file in files):,} bytes"
    words = {file: set(re.split(r"[^a-z]+", file.name.lower())) for file in files}
    by_split = {name: [file for file in files if words[file] & marks] for name, marks in _FILE_MARKS.items()}
    if twice := [file for file in files if sum(file in members for members in by_split.values()) > 1]:
        raise ConfigError(f"{twice[0]} is named for several splits: leave one of train, valid and test in its name")
    if not any(by_split.values()):
        return _cut(_join(files), description)
    if empty := [name for name, members in by_split.items() if not members]:
        raise ConfigError(
            f"{folder} has files for some splits and none for {', '.join(empty)}: have the word train, valid or test in "
            "the names of all, as in wiki.valid.raw, or of none"
        )
    return Text(description, **{name: _join(members) for name, members in by_split.items()})


def encode(text: Text, vocabulary: int | None, tokenizer_file: Path) -> Corpus:
    """As bytes (`vocabulary` none), or as byte-pair tokens of a tokenizer that is trained on the training text.

    `tokenizer_file` keeps that tokenizer, and is read if it is there.

    Raises:
        ConfigError: byte-pair tokens are wanted, and the package for them is not installed.
    """
    if vocabulary is None:
        splits = (np.frombuffer(getattr(text, name).encode(), np.uint8).astype(np.int64) for name in SPLITS)
        return Corpus(BYTE_LABELS, *(Tokens(torch.from_numpy(ids), 1.0) for ids in splits))
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
    numbers: dict[str, int] = tokenizer.get_vocab()
    labels = tuple(sorted(numbers, key=numbers.__getitem__))
    return Corpus(labels, *tokens)


def _cut(text: str, description: str) -> Text:
    first, second = (round(len(text) * share) for share in (_SHARES[0], sum(_SHARES)))
    return Text(description, text[:first], text[first:second], text[second:])


def _join(files: list[Path]) -> str:
    try:
        return "\n".join(file.read_text(encoding="utf-8") for file in files)
    except UnicodeDecodeError as exc:
        raise ConfigError(f"a text file is not UTF-8: {exc}") from exc
