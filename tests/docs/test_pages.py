"""What the documentation shows works: every block of a page is run, against a real server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.live import free_port
from tests.conftest import LiveServer, Trained
from tests.docs.page import Block, read_blocks, run_page
from training.dataset import Dataset

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["call.md", "budgets.md", "watch.md"])
def test_every_block_of_a_page_runs(
    name: str, server: LiveServer, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    image = Image.fromarray((digits.test.x[0].numpy() * 255).astype("uint8"))
    image.save(tmp_path / "runs" / "digits" / "sample.png")
    monkeypatch.chdir(tmp_path)
    assert run_page(DOCS / name, tmp_path, {"localhost:8000": server.url.removeprefix("http://")}) > 0


@pytest.mark.parametrize("name", ["secure.md", "serve.md", "settings.md"])
def test_every_block_of_a_page_with_a_server_of_its_own_runs(name: str, trained: Trained, tmp_path: Path) -> None:
    for folder in ("models/digits/1", "models/digits/2", "models/letters/1", "exported"):
        shutil.copytree(trained.bundle, tmp_path / folder)
    ports = {"8000": str(free_port()), "8443": str(free_port())}
    assert run_page(DOCS / name, tmp_path, {"hbll serve": "hbll serve --port 8000"} | ports) > 0


def test_every_block_of_the_page_about_export_runs(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(trained.run)
    (tmp_path / "models" / "digits").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert run_page(DOCS / "export.md", tmp_path, {}) > 0


def test_the_page_about_methods_runs_and_its_method_is_short(tmp_path: Path) -> None:
    page = DOCS / "methods.md"
    (example,) = (block for block in read_blocks(page.read_text(encoding="utf-8")) if block.file == "sandwich.py")
    assert len(example.text.splitlines()) < 40
    assert run_page(page, tmp_path, {}) > 0
    assert "| `sandwich:sandwich` | work | 1 |" in (tmp_path / "runs" / "sandwich-or-exits" / "comparison.md").read_text()


PAGE = """# A page

```sh
name=value; cd /
```

Text, and a block that is text:

```json
{"not": "run"}
```

<!-- not run: it would fail -->
```python
raise SystemExit
```

```python
number = 41
```

```sh
cat; test "$name at $PWD" = "value at /"
```

```python
assert number + 1 == 42
```
"""


def run(tmp_path: Path, page: str) -> int:
    (tmp_path / "page.md").write_text(page)
    return run_page(tmp_path / "page.md", tmp_path, {"41": "41"})


def test_blocks_of_a_page_share_a_shell_and_a_namespace(tmp_path: Path) -> None:
    assert run(tmp_path, PAGE) == 4


def test_a_block_is_left_out_only_with_a_reason_and_right_before_it() -> None:
    assert read_blocks(PAGE)[1] == Block("python", "raise SystemExit\n", 15, "it would fail")
    for comment in ("<!-- not run: -->", "<!-- not run -->", "<!-- not run: far away -->\n\nText between."):
        (block,) = read_blocks(f"{comment}\n\n```python\n1\n```\n")
        assert block.not_run is None


def test_a_block_of_a_language_that_nobody_runs_is_no_slip_of_the_pen() -> None:
    assert read_blocks("```json\n1\n```\n") == []
    with pytest.raises(ValueError, match="line 2: expected a block of sh, python or text, got 'pyton'"):
        read_blocks("```pyton\n1\n```\n")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("```sh\necho before; false; echo after\n```", r"(?s)page\.md, line 31: the shell ended with status 1:.*before"),
        ("```sh\nfalse | true\n```", "line 31: the shell ended with status 1"),
        ("```sh\necho $unset\n```", "line 31: .*\n.*unset: unbound variable"),
        ("```python\n1 / 0\n```", "line 31: ZeroDivisionError"),
    ],
)
def test_a_block_that_fails_is_told_with_its_place(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run(tmp_path, f"{PAGE}\n{code}\n")
