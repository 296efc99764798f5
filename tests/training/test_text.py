from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from training.config import ConfigError
from training.data_config import TextConfig
from training.dataset import DataError
from training.sources import load_data
from training.text import BYTE_LABELS, WINDOWS, Text, Tokens, embedded_text, encode, read_text

TEXT = Text("a text", "the cat sat on the mat\n" * 20, "the dog sat", "grüße, the mat")


def test_bytes_are_the_text_itself(tmp_path: Path) -> None:
    corpus = encode(TEXT, None, tmp_path / "tokenizer.json")
    assert corpus.vocabulary == 256
    assert bytes(corpus.test.ids.tolist()).decode() == TEXT.test
    assert corpus.test.bytes_each == 1
    assert not list(tmp_path.iterdir())


def test_byte_pairs_are_fewer_tokens_that_spell_the_text_and_are_kept(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    file = tmp_path / "tokenizer.json"
    corpus = encode(TEXT, 280, file)
    assert 256 < corpus.vocabulary <= 280
    assert corpus.train.bytes_each > 2
    assert Tokenizer.from_file(str(file)).decode(corpus.test.ids.tolist()) == TEXT.test, (
        "of bytes that training had not, too"
    )
    again = encode(Text("another", "x" * 50, TEXT.validation, TEXT.test), 280, file)
    assert torch.equal(again.test.ids, corpus.test.ids)


def test_a_windows_targets_are_the_tokens_after_it() -> None:
    tokens = Tokens(torch.arange(100), 1.0)
    x, y = tokens.windows(8, np.random.default_rng(0), 50)
    assert torch.equal(y.reshape(50, 8), x + 1)
    assert x.min() >= 0
    assert y.max() <= 99
    assert len(set(x[:, 0].tolist())) > 20


def test_all_windows_cover_the_split_once() -> None:
    batches = list(Tokens(torch.arange(30), 1.0).all_windows(4, at_once=3))
    assert torch.cat([x.flatten() for x, _ in batches]).tolist() == list(range(28))
    assert torch.cat([y for _, y in batches]).tolist() == list(range(1, 29))
    assert [len(x) for x, _ in batches] == [3, 3, 1]


def test_the_embedded_text_is_english_and_its_splits_are_apart() -> None:
    text = embedded_text()
    assert len(text.train) > 15 * len(text.test) > 100_000
    assert " the " in text.test
    assert text == embedded_text()


def test_files_named_for_splits_are_those_splits(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"wiki.{name}.raw").write_text(f"{name} text", encoding="utf-8")
    text = read_text(tmp_path)
    assert (text.train, text.validation, text.test) == ("train text", "valid text", "test text")
    (tmp_path / "wiki.valid.raw").unlink()
    with pytest.raises(ConfigError, match="none for validation"):
        read_text(tmp_path)


def test_a_split_is_a_whole_word_of_a_files_name(tmp_path: Path) -> None:
    """Bug found: latest_train.txt was of the test split, too."""
    for name in ("latest_train", "my-validation", "test2"):
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    text = read_text(tmp_path)
    assert (text.train, text.validation, text.test) == ("latest_train", "my-validation", "test2")
    (tmp_path / "test_train.txt").touch()
    with pytest.raises(ConfigError, match=r"test_train.txt is named for several splits"):
        read_text(tmp_path)


def test_other_files_are_joined_and_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 50, encoding="utf-8")
    (tmp_path / "b.txt").write_text("b" * 49, encoding="utf-8")
    (tmp_path / "c.png").write_bytes(b"\xff")
    text = read_text(tmp_path)
    assert (len(text.train), len(text.validation), len(text.test)) == (90, 5, 5)
    assert text.train.startswith("aaa")
    assert text.test == "bbbbb"


@pytest.mark.parametrize(("content", "message"), [(None, "holds no text"), (b"\xff\xfe\x00", "not UTF-8")])
def test_a_folder_without_text_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_text(tmp_path)


def test_windows_are_rows_and_the_token_after_each_is_its_label(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: abcdefgh", encoding="utf-8")
    data = load_data(TextConfig(folder=tmp_path, context=4))
    rows = bytes(data.test.x.flatten().tolist()).decode()
    assert rows.startswith("test" + "est:")
    assert rows.endswith("defg")
    assert [data.spec.labels[label] for label in data.test.labels.tolist()] == list(": abcdefgh")
    assert (data.spec.vocabulary, data.spec.input_shape, data.spec.normalisation) == (256, (4,), None)
    assert len(data.certification) == 0
    (tmp_path / "test.txt").write_text("abc", encoding="utf-8")
    with pytest.raises(DataError, match="test: expected more than 4 tokens, got 3"):
        load_data(TextConfig(folder=tmp_path, context=4))


def test_windows_of_a_long_text_are_spread_over_all_of_it() -> None:
    data = load_data(TextConfig(context=64))
    assert len(data.train) == len(data.validation) == len(data.test) == WINDOWS
    text = embedded_text().test.encode()
    assert bytes(data.test.x[0].tolist()) == text[:64]
    assert data.test.labels[-1] == text[-1]


def test_bytes_have_names_that_differ() -> None:
    assert len(set(BYTE_LABELS)) == 256
    assert (BYTE_LABELS[ord("a")], BYTE_LABELS[10], BYTE_LABELS[255]) == ("a", "\\x0a", "\\xff")


def test_a_tokenizer_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer.json does not exist"):
        load_data(TextConfig(tokenizer=tmp_path / "tokenizer.json"))


def test_windows_of_byte_pairs_have_the_tokenizers_names(tmp_path: Path) -> None:
    corpus = encode(embedded_text(), 300, tmp_path / "tokenizer.json")
    data = load_data(TextConfig(tokenizer=tmp_path / "tokenizer.json", context=16))
    assert data.spec.labels == corpus.labels
    assert len(set(corpus.labels)) == data.spec.vocabulary == 300
    assert torch.equal(data.test.x[0], corpus.test.ids[:16])
