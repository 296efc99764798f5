"""What models and versions are called: the folders `MODEL/VERSION` of a repository, and what stands for them in URLs."""

from __future__ import annotations

import re

MODEL_NAME = "letters, digits, '.', '_' and '-', at most 64 and the first a letter or a digit"
VERSION = "a whole number from 1 to 999999999"

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


def is_model_name(name: str) -> bool:
    """Whether servers take a folder of this name for a model's: it is `MODEL_NAME`."""
    return _MODEL_NAME.fullmatch(name) is not None


def is_version(name: str) -> bool:
    """Whether servers take a folder of this name within a model's for a version: it is `VERSION`."""
    return _VERSION.fullmatch(name) is not None
