"""Measured latencies, kept in a folder for the next start on the same machine."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

from service.profile import Parts

logger = logging.getLogger(__name__)

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Circumstances:
    """All that measured latencies depend on; where one of these differs they are measured again."""

    bundle: str  # SHA-256 of its manifest, which has those of all files
    processor: str
    runtime: str
    providers: tuple[str, ...]
    threads: int
    max_batch: int


class ProfileCache:
    """One JSON file per circumstances. What cannot be read or written costs a warning and a measurement, no more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, of: Circumstances) -> Parts | None:
        """What was measured under these circumstances, if anything."""
        file = self._file(of)
        try:
            return Parts.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as exc:
            logger.warning("the saved latencies in %s cannot be used and are measured again: %s", file, exc)
            return None

    def save(self, of: Circumstances, parts: Parts) -> None:
        """Keep them. A reader sees the old file or the new one, whole."""
        file = self._file(of)
        temporary = file.with_suffix(f".{secrets.token_hex(4)}.tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(parts.model_dump_json())
            temporary.replace(file)
        except OSError as exc:
            with suppress(OSError):
                temporary.unlink()
            logger.warning(
                "the measured latencies cannot be kept in %s: %s. Set HBLL_CACHE_DIR", self._folder, exc.strerror
            )

    def _file(self, of: Circumstances) -> Path:
        content = json.dumps(asdict(of), sort_keys=True).encode()
        return self._folder / f"profile-{hashlib.sha256(content).hexdigest()[:32]}.json"


def processor_name() -> str:
    """As the operating system calls it."""
    try:
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
