"""A page of the documentation as something to run: its blocks of shell and Python, in order, in one shell and one namespace.

A block is left out by a comment on the line before it, which says why: `<!-- not run: the reason -->`. One after a paragraph
that is a name alone, `` `name`: ``, is that file, and written rather than run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from markdown_it import MarkdownIt

_NOT_RUN = re.compile(r"<!--\s*not run:\s*(?P<reason>\S.*?)\s*-->")
_NAME = re.compile(r"`(?P<name>[\w.-]+)`:")
_RUN = {"sh", "python"}
_TEXT = {"", "text", "json", "yaml", "toml"}
_BLOCK_S = 300


@dataclass(frozen=True)
class Block:
    """A fenced block of `language` sh or python, or of any that is the `file`; `line` is that of its first line of code,
    `not_run` why it is left out."""

    language: str
    text: str
    line: int
    not_run: str | None
    file: str | None = None


def read_blocks(markdown: str) -> list[Block]:
    """The blocks of a page that are to be run or written.

    Raises:
        ValueError: a block that is neither one of these nor text.
    """
    blocks = []
    reason: str | None = None
    file: str | None = None
    for token in MarkdownIt().parse(markdown):
        if token.type == "fence" and token.map is not None:
            language, line = token.info.strip(), token.map[0] + 2
            if language not in _RUN | _TEXT:
                raise ValueError(f"line {line}: expected a block of sh, python or text, got {language!r}")
            if language in _RUN or file is not None:
                blocks.append(Block(language, token.content, line, reason, file))
        found = _NOT_RUN.fullmatch(token.content.strip()) if token.type == "html_block" else None
        reason = found["reason"] if found else None
        if token.type != "paragraph_close":  # which is between a paragraph and its block
            named = _NAME.fullmatch(token.content) if token.type == "inline" else None
            file = named["name"] if named else None
    return blocks


def run_page(page: Path, folder: Path, replaced: Mapping[str, str]) -> int:
    """Run the blocks of `page` as `walked` does; how many were run."""
    with walked(page, folder, replaced) as printed:
        return len(printed)


@contextmanager
def walked(page: Path, folder: Path, replaced: Mapping[str, str]) -> Iterator[list[tuple[Block, str]]]:
    """Run the blocks of `page` in `folder`, each of `replaced` put in place of what the page says. Gives those that were run,
    each with what it printed if it is shell; what they left running in the background ends with the context.

    Raises:
        AssertionError: a block failed; the message says where, and what it printed.
    """
    namespace: dict[str, Any] = {"__name__": "__page__"}
    ran: list[tuple[Block, str]] = []
    with Shell(folder) as shell:
        for block in read_blocks(page.read_text(encoding="utf-8")):
            if block.not_run is not None:
                continue
            text = block.text
            for old, new in replaced.items():
                text = text.replace(old, new)
            where = f"{page.name}, line {block.line}"
            printed = ""
            if block.file is not None:
                (folder / block.file).write_text(text, encoding="utf-8")
                continue
            if block.language == "sh":
                printed = shell.run(text, where)
            else:
                _run_python(text, where, block.line, page, namespace)
            ran.append((block, printed))
        yield ran


def _run_python(text: str, where: str, line: int, page: Path, namespace: dict[str, Any]) -> None:
    code = compile("\n" * (line - 1) + text, str(page), "exec")  # so that tracebacks show the page's lines
    try:
        exec(code, namespace)
    except Exception as exc:
        raise AssertionError(f"{where}: {type(exc).__name__}: {exc}") from exc


class Shell:
    """A bash that stops at the first failure, for all blocks of a page. `python` is ours, `hbll` that of this tree."""

    def __init__(self, folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HBLL_")}
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=environment,
            start_new_session=True,  # so that what it started can be ended with it
        )
        self._tell(f'set -euo pipefail\npython() {{ "{sys.executable}" "$@"; }}\nhbll() {{ python -m hbll "$@"; }}\n')

    def run(self, text: str, where: str) -> str:
        """What `text` prints.

        Raises:
            AssertionError: a command of it failed, or it did not end.
        """
        mark = f"--- end of {where} ---"
        # Commands of the block must not read the shell's own input, which is the rest of the page.
        self._tell("{\n" + text + f"\n}} < /dev/null\nprintf '\\n%s\\n' '{mark}'\n")
        printed: list[str] = []
        assert self._process.stdout is not None
        guard = threading.Timer(_BLOCK_S, os.killpg, (self._process.pid, signal.SIGKILL))
        guard.start()
        try:
            for line in self._process.stdout:
                if line.rstrip("\n") == mark:
                    return "".join(printed)
                printed.append(line)
        finally:
            guard.cancel()
        raise AssertionError(f"{where}: the shell ended with status {self._process.wait()}:\n{''.join(printed)}")

    def _tell(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):  # it ended by itself, and started nothing that goes on
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
