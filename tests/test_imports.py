"""The arrows between the packages, and what each can be used without."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"family", "training", "export", "service", "benchmarks", "hbll"}
ARROWS = {
    "family": set(),
    "training": {"family"},
    "export": {"training", "family"},
    "service": {"family"},
    "benchmarks": {"family", "training", "export", "service", "hbll"},
    "hbll": set(),  # the command line imports the others by name, when they are called
}
HEAVY = {
    "torch",
    "onnx",
    "onnxscript",
    "mlxtend",
    "matplotlib",
    "scipy",
    "safetensors",
    "tensorboard",
    "training",
    "export",
}

BLOCKED = f"""
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f'no module named {{name}}', name=name.partition('.')[0])

sys.meta_path.insert(0, Blocker())
"""


def imported(file: Path) -> set[str]:
    """Top-level names that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", ARROWS)
def test_packages_import_only_what_their_arrows_allow(package: str) -> None:
    files = sorted((ROOT / package).glob("**/*.py"))
    assert files
    for file in files:
        assert imported(file) & OURS <= ARROWS[package] | {package}, file


def test_only_the_runtime_knows_onnxruntime() -> None:
    knowing = [file.name for file in (ROOT / "service").glob("*.py") if "onnxruntime" in imported(file)]
    assert knowing == ["runtime.py"]


def test_the_kernel_needs_pydantic_and_for_pixels_numpy_and_pillow_at_most() -> None:
    for file in (ROOT / "family").glob("*.py"):
        third_party = imported(file) - set(sys.stdlib_module_names) - OURS
        allowed = {"manifest.py": {"pydantic"}, "pixels.py": {"numpy", "PIL"}}
        assert third_party <= allowed.get(file.name, set()), file


def test_the_client_needs_httpx_anyio_and_numpy_and_pil_only_for_who_has_its_images() -> None:
    files = sorted((ROOT / "hbll" / "client").glob("**/*.py"))
    assert files
    third_party = {file.name: imported(file) - set(sys.stdlib_module_names) - {"hbll"} for file in files}
    assert set().union(*third_party.values()) == {"httpx", "anyio", "numpy", "PIL"}
    assert [name for name, names in third_party.items() if "PIL" in names] == ["inputs.py"]
    code = "import hbll.client, sys; print({'PIL', 'pydantic', 'fastapi', 'onnxruntime', 'service'} & set(sys.modules))"
    assert _run_blocked(code).stdout == "set()\n"


def _run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_service_answers_without_torch_and_onnx(trained) -> None:
    """A whole server in a process where neither can be imported."""
    code = f"""
import asyncio, httpx
from pathlib import Path
from service.app import create_app
from service.settings import Settings

async def main():
    app = create_app(Settings(models=Path({str(trained.models)!r})))
    async with app.router.lifespan_context(app):
        while not app.state.context.ready:
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url='http://test') as client:
            answer = await client.post('/v1/models/digits/predict', json={{'inputs': [[[0.5] * 28] * 28], 'depth': 3}})
            print(answer.status_code, answer.json()['predictions'][0]['depth'])

asyncio.run(main())
"""
    done = _run_blocked(code)
    assert done.stdout == "200 3\n", done.stderr


@pytest.mark.parametrize(("command", "extra"), [("train", "train"), ("export", "export,train,cpu")])
def test_a_missing_extra_is_named(command: str, extra: str) -> None:
    done = _run_blocked(f"from hbll.cli import main; main(['{command}', '--help'])")
    assert done.returncode == 1
    assert f"pip install 'hbll-anytime[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_needs_nothing() -> None:
    done = _run_blocked("from hbll.cli import main; main(['--help'])")
    assert done.returncode == 0
    for name in ("train", "evaluate", "export", "inspect", "verify", "serve", "predict"):
        assert name in done.stdout
