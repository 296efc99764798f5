from __future__ import annotations

import pytest

from family.names import is_model_name, is_version


@pytest.mark.parametrize("name", ["digits", "Digits-2.1_b", "7", "a" * 64])
def test_a_model_can_be_called_so(name: str) -> None:
    assert is_model_name(name)


@pytest.mark.parametrize("name", ["", ".hidden", "-a", "my model", "größe", "a/b", "a\n", "a" * 65])
def test_a_model_cannot_be_called_so(name: str) -> None:
    assert not is_model_name(name)


@pytest.mark.parametrize(("name", "is_one"), [("1", True), ("999999999", True), ("0", False), ("01", False), ("v1", False),
                                              ("1.0", False), ("", False), ("1000000000", False), ("1\n", False), ("\u0661", False)])  # fmt: skip
def test_a_version_is_a_whole_number_as_one_writes_it(name: str, is_one: bool) -> None:
    assert is_version(name) is is_one
