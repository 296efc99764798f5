"""One process at a time in a run's folder: an advisory lock, which ends with the process that holds it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.config import ConfigError

if sys.platform != "win32":
    import fcntl

LOCK_FILE = ".lock"


@contextmanager
def alone_in(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold `folder` against others that would hold it: with `wait` as soon as it is free, else now or not at all.

    Where the system, or the file system, has no such locks, nobody is kept out.

    Raises:
        ConfigError: another process holds it, and `wait` is not set.
    """
    if sys.platform == "win32":
        yield
        return
    with (folder / LOCK_FILE).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ConfigError(
                f"another process trains in {folder}: let it end first, or choose another folder with --out"
            ) from exc
        except OSError:  # a file system without locks
            pass
        yield
