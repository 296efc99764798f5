"""The file of API keys: TOML, a table for each key with the SHA-256 of its token, its rate limit and whether it is an
operator's. Tokens themselves are nowhere: who makes one sees it once.

A plain hash is right here, and a slow one, as passwords need, would only cost time: a token has 256 random bits, so nobody
who reads the file can find it by trying.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomlkit
from limits import RateLimitItem, parse_many
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator
from tomlkit.exceptions import TOMLKitError

_PREFIX = "hbll_"
"""So that people, and scanners for leaked secrets, see what a token is."""

_MOST = 10_000
"""Requests of a rate limit: the times of so many are kept for each key."""


class KeysError(Exception):
    """The file of keys cannot be read or written, or is not one."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is kept: `digest` is the SHA-256 of its token."""

    name: str
    digest: bytes
    rate: RateLimitItem | None = None
    admin: bool = False


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    rate: str | None = None
    admin: bool = False

    @field_validator("rate")
    @classmethod
    def _is_a_rate(cls, text: str | None) -> str | None:
        if text is not None:
            read_rate(text)
        return text


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")], _Entry] = Field(
        default_factory=dict
    )


def digest_of(token: str) -> bytes:
    """The digest by which a token is known."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def read_rate(text: str) -> RateLimitItem:
    """A rate limit like `100/second`.

    Raises:
        ValueError: it is none, or counts too many requests to remember them all.
    """
    try:
        (rate,) = parse_many(text)
    except ValueError as exc:
        raise ValueError(f"expected one rate like 100/second or 5000 per hour, got {text[:40]!r}") from exc
    if not 1 <= rate.amount <= _MOST or rate.multiples < 1:
        raise ValueError(f"expected a rate of 1 to {_MOST} requests, in some other time if need be, got {text[:40]!r}")
    return rate


def read_keys(file: Path) -> tuple[Key, ...]:
    """The keys in `file`; none is possible.

    Raises:
        KeysError: it cannot be read or is no file of keys.
    """
    return _keys(_document(file), file)


def add_key(file: Path, name: str, *, rate: str | None, admin: bool) -> str:
    """Add a key to `file`, which is made if need be, and return its new token, of which only the digest is kept.

    Raises:
        KeysError: the name is taken or none, the rate is none, or the file cannot be read or written.
    """
    document = _document(file, missing_ok=True)
    if name in document.get("keys", {}):
        raise KeysError(f"{file} has a key {name!r} already: remove it first, or take another name")
    token = _PREFIX + secrets.token_urlsafe(32)
    entry = tomlkit.table()
    entry.update(
        {"sha256": digest_of(token).hex(), **({"rate": rate} if rate else {}), **({"admin": True} if admin else {})}
    )
    document.setdefault("keys", tomlkit.table(is_super_table=True))[name] = entry
    _keys(document, file)
    _write(file, tomlkit.dumps(document))
    return token


def remove_key(file: Path, name: str) -> None:
    """Remove a key from `file`.

    Raises:
        KeysError: it has no such key, or the file cannot be read or written.
    """
    document = _document(file)
    if name not in document.get("keys", {}):
        names = ", ".join(key.name for key in _keys(document, file)) or "none"
        raise KeysError(f"{file} has no key {name!r}: it has {names}")
    del document["keys"][name]
    _write(file, tomlkit.dumps(document))


def _document(file: Path, *, missing_ok: bool = False) -> Any:
    try:
        return tomlkit.parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        if missing_ok:
            return tomlkit.document()
        raise KeysError(f"the keys file {file} does not exist: `hbll keys add NAME --file {file}` makes it") from exc
    except (OSError, TOMLKitError, UnicodeDecodeError) as exc:
        raise KeysError(f"the keys file {file} cannot be read: {exc}") from exc


def _keys(document: Any, file: Path) -> tuple[Key, ...]:
    try:
        entries = _File.model_validate(document.unwrap()).keys
    except ValidationError as exc:
        problem = exc.errors(include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise KeysError(f"the keys file {file} is wrong: {where}: {problem['msg'].removeprefix('Value error, ')}") from exc
    if len({entry.sha256 for entry in entries.values()}) < len(entries):
        raise KeysError(f"the keys file {file} is wrong: two keys have the same sha256, so nobody could say whose it is")
    return tuple(
        Key(name, bytes.fromhex(entry.sha256), read_rate(entry.rate) if entry.rate else None, entry.admin)
        for name, entry in entries.items()
    )


def _write(file: Path, text: str) -> None:
    """Replace `file`, for its owner's eyes only: a reader sees the old or the new one, whole."""
    try:
        # The same folder, so that the replacement is one step; mkstemp lets nobody else read.
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            if file.exists():
                temporary.chmod(file.stat().st_mode & 0o777)
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise KeysError(f"the keys file {file} cannot be written: {exc}") from exc
