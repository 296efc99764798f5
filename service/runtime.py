"""The gated graph in ONNX Runtime: one session runs any part of any path. The only module that knows onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from family.manifest import GATED_FILE, BundleError, Manifest
from family.tree import Path

Rows = NDArray[np.float32 | np.int64]
"""Inputs, which are numbers or tokens, or states."""

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@dataclass(frozen=True, slots=True)
class Output:
    """What a run gives: `logits (rows, classes)` if it predicted, `state (rows, *state_shape)` if it was kept."""

    logits: NDArray[np.float32] | None
    state: NDArray[np.float32] | None


class Runtime:
    """One ONNX Runtime session on a bundle's gated graph. Calls may come from any one thread at a time.

    Raises:
        BundleError: the graph cannot be loaded; the message names the file.
    """

    def __init__(
        self, bundle: FilePath, manifest: Manifest, *, threads: int, device: Literal["auto", "cpu", "gpu"]
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        file = bundle / GATED_FILE
        try:
            self._session = ort.InferenceSession(str(file), options, providers=_providers(device))
        except Exception as exc:
            raise BundleError(f"{file} cannot be loaded by ONNX Runtime: {exc}") from exc
        if device == "gpu" and self._session.get_providers()[0] != _CUDA:
            raise BundleError("device gpu was asked for, but ONNX Runtime could not use CUDA: its log above says why")
        self._blocks = len(manifest.tree.nodes)
        self._no_x = np.zeros((0, *manifest.input.shape[1:]), manifest.input.code)
        self._no_state = np.zeros((0, *manifest.state.shape[1:]), np.float32)
        self._flags = (np.array(False), np.array(True))

    @property
    def name(self) -> str:
        """The library and its version."""
        return f"onnxruntime {ort.__version__}"

    @property
    def providers(self) -> tuple[str, ...]:
        """The session's execution providers, preferred first."""
        return tuple(self._session.get_providers())

    def run(self, nodes: Path, source: Rows, *, embed: bool, predict: bool = True, keep_state: bool = False) -> Output:
        """Run the blocks of `nodes` in rising order.

        Args:
            nodes: internal nodes, a part of a path; may be empty.
            source: `x (rows, *input_shape)` if `embed`, else a state `(rows, *state_shape)` from an earlier run.
            embed: start at node 0, from `x`.
            predict: read the head after the last block, which is an exit.
            keep_state: return the state after the last block, for a run that goes on from it.
        """
        visit = np.zeros(self._blocks, np.bool_)
        for node in nodes:
            visit[node - 1] = True
        feeds = {
            "x": source if embed else self._no_x,
            "state": self._no_state if embed else source,
            "visit": visit,
            "embed": self._flags[embed],
            "predict": self._flags[predict],
        }
        wanted = [name for name, asked in (("logits", predict), ("state_out", keep_state)) if asked]
        values = dict(zip(wanted, self._session.run(wanted, feeds), strict=True))
        return Output(values.get("logits"), values.get("state_out"))


def _providers(device: Literal["auto", "cpu", "gpu"]) -> list[str]:
    available = ort.get_available_providers()
    if device == "gpu" and _CUDA not in available:
        raise BundleError("device gpu was asked for, but this onnxruntime has no CUDA: pip install 'hbll-anytime[gpu]'")
    if device != "cpu" and _CUDA in available:
        return [_CUDA, _CPU]
    return [_CPU]
