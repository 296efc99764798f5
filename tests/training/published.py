"""Small files in the published formats, and a server that has them; the real ones differ in size alone."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from training.publications import IMAGES, TEXTS

RNG = np.random.default_rng(0)


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def _cifar(labels: np.ndarray, pixels: np.ndarray) -> bytes:
    """`labels` (rows, label bytes), `pixels` (rows, 3, 32, 32)."""
    return np.concatenate([labels, pixels.reshape(len(pixels), -1)], axis=1).astype(np.uint8).tobytes()


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


DIGITS = {
    part: (RNG.integers(0, 256, (rows, 28, 28), np.uint8), np.arange(rows) % 10)
    for part, rows in (("train", 200), ("t10k", 50))
}
TEN = [(np.arange(20)[:, None] % 10, RNG.integers(0, 256, (20, 3, 32, 32), np.uint8)) for _ in range(6)]
NAMES = [f"thing {n}" for n in range(10)]
HUNDRED_LABELS = np.stack([np.arange(400) % 20, np.arange(400) % 100], axis=1)
HUNDRED_PIXELS = RNG.integers(0, 256, (400, 3, 32, 32), np.uint8)


WORDS = {"train": "All of it . " * 200, "valid": "Some of it . " * 20, "test": "None of it . " * 20}


def files_of(kind: str) -> dict[str, bytes]:
    if kind == "mnist":
        return {
            f"{part}-{what}-ubyte.gz": gzip.compress(_idx(array.astype(np.uint8)))
            for part, arrays in DIGITS.items()
            for what, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True)
        }
    if kind == "cifar10":
        names = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")
        members = {f"cifar-10-batches-bin/{name}": _cifar(*part) for name, part in zip(names, TEN, strict=True)}
        meta = ("\n".join(NAMES) + "\n\n").encode()  # the published file ends with an empty line
        return {"cifar-10-binary.tar.gz": tar(members | {"cifar-10-batches-bin/batches.meta.txt": meta})}
    if kind == "wikitext103":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for split, words in WORDS.items():
                archive.writestr(f"wikitext-103-raw/wiki.{split}.raw", words)
        return {"wikitext-103-raw-v1.zip": buffer.getvalue()}
    content = _cifar(HUNDRED_LABELS, HUNDRED_PIXELS)
    fine = "\n".join(f"fine {n}" for n in range(100)).encode()
    members = {"train.bin": content, "test.bin": content[: 3074 * 100], "fine_label_names.txt": fine}
    return {"cifar-100-binary.tar.gz": tar({f"cifar-100-binary/{name}": data for name, data in members.items()})}


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Our small files are the published ones: their MD5 is what is expected, a server of ours has them."""
    served = tmp_path / "served"
    served.mkdir()
    handler = partial(_Quiet, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for kind, publication in (IMAGES | TEXTS).items():
        files = files_of(kind)
        assert files.keys() == publication.files.keys()
        for name, content in files.items():
            (served / name).write_bytes(content)
        digests = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
        small = replace(publication, url=f"http://127.0.0.1:{server.server_port}/", files=digests)
        monkeypatch.setitem(IMAGES if kind in IMAGES else TEXTS, kind, small)
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
