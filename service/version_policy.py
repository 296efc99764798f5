"""Which of a model's versions are served: the highest, some of the highest, all, or those that are named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator


def _check(value: Any) -> Any:
    if value in ("latest", "all") or _is_count(value):
        return value
    if isinstance(value, (list, tuple)) and value and all(map(_is_count, value)):
        return tuple(value)
    raise ValueError(
        f"expected latest, all, how many of the highest versions, or a list of versions like [1, 3], got {value!r}"[:300]
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


Versions = Annotated[Literal["latest", "all"] | int | tuple[int, ...], BeforeValidator(_check)]
"""As a setting: `latest` (the highest), `all`, the number of highest ones, or a list of versions."""


def choose(versions: Versions, found: Iterable[int]) -> list[int]:
    """Those of the `found` versions that are to be served, highest first."""
    falling = sorted(found, reverse=True)
    if versions == "all":
        return falling
    if isinstance(versions, tuple):
        return [version for version in falling if version in versions]
    return falling[: 1 if versions == "latest" else versions]
