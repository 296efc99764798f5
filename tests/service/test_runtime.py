from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from family.manifest import BundleError
from family.tree import Tree
from service.runtime import Runtime
from tests.conftest import Trained


@pytest.fixture(scope="module")
def runtime(trained: Trained) -> Runtime:
    return Runtime(trained.bundle, trained.manifest, threads=1, device="cpu")


def _inputs(count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, 28, 28), dtype=np.float32)


@pytest.mark.parametrize("path", list(Tree(3).paths()))
def test_every_path_equals_its_own_graph(trained: Trained, runtime: Runtime, path: tuple[int, ...]) -> None:
    session = ort.InferenceSession(
        str(trained.bundle / trained.manifest.offered[path].file), providers=["CPUExecutionProvider"]
    )
    x = _inputs(3)
    (expected,) = session.run(None, {"x": x})
    np.testing.assert_allclose(runtime.run(path, x, embed=True).logits, expected, atol=1e-5)


def test_a_row_does_not_depend_on_who_shares_its_batch(runtime: Runtime) -> None:
    x = _inputs(16)
    together = runtime.run((4, 6, 7), x, embed=True).logits
    alone = np.concatenate([runtime.run((4, 6, 7), x[i : i + 1], embed=True).logits for i in range(16)])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_going_on_from_a_state_equals_one_run(runtime: Runtime) -> None:
    x = _inputs(5)
    first = runtime.run((4,), x, embed=True, keep_state=True)
    assert first.state is not None
    assert first.logits is not None
    second = runtime.run((6, 7), first.state[[1, 3]], embed=False)
    np.testing.assert_allclose(second.logits, runtime.run((4, 6, 7), x[[1, 3]], embed=True).logits, atol=1e-5)
    assert second.state is None


def test_nothing_is_predicted_unless_asked(runtime: Runtime) -> None:
    output = runtime.run((4,), _inputs(2), embed=True, predict=False, keep_state=True)
    assert output.logits is None
    assert output.state is not None
    assert output.state.shape == (2, 4, 16)


def test_a_graph_that_is_none_is_named(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "family.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"family.onnx cannot be loaded"):
        Runtime(tmp_path, trained.manifest, threads=1, device="cpu")


def test_a_gpu_that_is_not_there_is_said(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.runtime.ort.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BundleError, match="has no CUDA"):
        Runtime(trained.bundle, trained.manifest, threads=1, device="gpu")
