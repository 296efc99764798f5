"""The bundle's schema: what `export` writes in `manifest.json` and the service reads, and the checks of a bundle.

A bundle is one folder:

    manifest.json      this schema
    weights.bin        one copy of all weights (ONNX external data, 4096-byte aligned)
    family.onnx        the gated graph: every path in one session
    path_4-6.onnx ...  one ONNX graph per offered path, x -> logits

The manifest lists every other file with its SHA-256 and carries the SHA-256 of its own canonical JSON, so a
truncated, edited or missing file is found before anything is served.
"""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from functools import cached_property
from pathlib import Path as FilePath
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from family.choice import best_by_depth, climb, pareto_front, reference_path
from family.tree import InvalidPath, Path, Tree, format_path

FORMAT_VERSION = "1.2"
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.bin"
GATED_FILE = "family.onnx"

_MAX_MANIFEST_BYTES = 32 * 1024 * 1024
_HASH_CHUNK_BYTES = 1024 * 1024

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class BundleError(ValueError):
    """A bundle that must not be served; the message names the file and what is wrong with it."""


class _Model(BaseModel):
    # What a newer minor version adds is ignored; that nothing was slipped in is the digest's business.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class TensorSpec(_Model):
    """A tensor of the graphs. `shape` has -1 for the free batch axis; `datatype` is the Open Inference Protocol's."""

    name: str
    datatype: Literal["FP32", "INT64"]
    shape: tuple[int, ...] = Field(min_length=2)

    @property
    def code(self) -> str:
        """What numpy calls the type of its values: little-endian, in arrays and in bytes."""
        return {"FP32": "<f4", "INT64": "<i8"}[self.datatype]


class ImageInput(_Model):
    """How an image becomes a row: grey (`channels` 1) or red, green and blue (3), resized to `height` x `width`, its
    pixels divided by 255. A grey row is `(height, width)`, a coloured one `(3, height, width)`."""

    height: int = Field(ge=1)
    width: int = Field(ge=1)
    channels: Literal[1, 3] = 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row."""
        return (self.height, self.width) if self.channels == 1 else (self.channels, self.height, self.width)


class Normalisation(_Model):
    """What the graphs themselves do with an input, so that clients need not: `(x - mean) / std`, with one value for all,
    or one for each index of a row's first axis (a column of a table, a colour)."""

    mean: tuple[float, ...] = Field(min_length=1)
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _goes_together(self) -> Normalisation:
        if len(self.mean) != len(self.std):
            raise ValueError(f"expected as many means as standard deviations, got {len(self.mean)} and {len(self.std)}")
        return self


class Metrics(_Model):
    """What a path does on one split. `accuracy`, `agreement` (same answer as the reference path) and
    `calibration_error` (expected calibration error, 15 equal bins) are shares, 0..1; `loss` is in nats a row. Loss and
    calibration error are those of the temperature-scaled probabilities that the service returns."""

    accuracy: float = Field(ge=0, le=1)
    loss: float = Field(ge=0)
    agreement: float = Field(ge=0, le=1)
    calibration_error: float = Field(ge=0, le=1)


class PathEntry(_Model):
    """One offered path: `flops` (of one row; a multiply-add counts two) and `parameters` include embedding and head;
    probabilities are `softmax(logits / temperature)`."""

    path: str
    file: FileName
    parameters: int = Field(ge=0)
    flops: int = Field(ge=0)
    temperature: float = Field(gt=0)
    validation: Metrics
    test: Metrics


class RiskLevel(_Model):
    """With early exits at `threshold`, answers differ from the reference path's with probability at most `epsilon`."""

    epsilon: float = Field(gt=0, lt=1)
    threshold: float = Field(ge=0, le=1)


class Certificate(_Model):
    """Certified early exits (Learn then Test): a row climbs `sequence` and exits at the first path whose calibrated
    confidence reaches a level's threshold, else at the last, the reference path. With probability at least
    `1 - delta` over the `rows` of certification data, *all* levels hold, for rows that are drawn like those."""

    sequence: tuple[str, ...] = Field(min_length=1)
    delta: float = Field(gt=0, lt=1)
    rows: int = Field(ge=1)
    levels: tuple[RiskLevel, ...]


class Provenance(_Model):
    """Where the weights come from."""

    dataset: str
    method: str
    seed: int
    steps: int
    block_evaluations: int
    git_revision: str | None
    libraries: dict[str, str]


class Manifest(_Model):
    """Everything that the service needs to know of a bundle."""

    format_version: str
    name: str = Field(min_length=1, max_length=64)
    hierarchy_depth: int = Field(ge=1, le=10)
    input: TensorSpec
    state: TensorSpec
    output: TensorSpec
    labels: tuple[str, ...] = Field(min_length=1)
    image: ImageInput | None
    features: tuple[str, ...] | None = Field(None, description="the columns of a table, in the order of the input")
    normalisation: Normalisation | None = None
    vocabulary: int | None = Field(None, ge=1, description="rows are tokens, whole numbers below this, INT64")
    paths: tuple[PathEntry, ...] = Field(min_length=1)
    certificate: Certificate | None = None
    provenance: Provenance
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _is_consistent(self) -> Manifest:
        seen = set()
        for entry in self.paths:
            try:
                path = self.tree.parse(entry.path)
            except InvalidPath as exc:
                raise ValueError(str(exc)) from exc
            if (entry.path, entry.file) != (format_path(path), file_name(path)):
                raise ValueError(
                    f"expected path {format_path(path)} in {file_name(path)}, got {entry.path} in {entry.file}"
                )
            seen.add(path)
        if len(seen) != len(self.paths):
            raise ValueError("a path is listed twice")
        wanted = {WEIGHTS_FILE, GATED_FILE, *(entry.file for entry in self.paths)}
        if missing := sorted(wanted - self.files.keys()):
            raise ValueError(f"`files` lacks {', '.join(missing)}")
        sequence = tuple(map(format_path, self.climb))
        if self.certificate is not None and self.certificate.sequence != sequence:
            raise ValueError(
                f"the certificate is for {self.certificate.sequence}, and these paths are climbed as {sequence}"
            )
        row = self.input.shape[1:]
        if self.image is not None and self.image.row_shape != row:
            raise ValueError(f"images are rows of shape {list(self.image.row_shape)}, the input's are {list(row)}")
        if self.features is not None and row != (len(self.features),):
            raise ValueError(f"{len(self.features)} features for an input of shape {list(self.input.shape)}")
        if (self.input.datatype == "INT64") != (self.vocabulary is not None):
            raise ValueError(f"expected a vocabulary for tokens, INT64, and for nothing else; input {self.input.datatype}")
        if len(set(self.labels)) != len(self.labels):  # probabilities go by label
            raise ValueError(f"expected labels each another, got {len(self.labels)} with {len(set(self.labels))} different")
        if self.output.shape[-1] != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels for an output of shape {list(self.output.shape)}")
        return self

    @cached_property
    def tree(self) -> Tree:
        """The tree whose paths these are."""
        return Tree(self.hierarchy_depth)

    @cached_property
    def offered(self) -> dict[Path, PathEntry]:
        """The offered paths, shallowest first, then by node order."""
        entries = {self.tree.parse(entry.path): entry for entry in self.paths}
        return dict(sorted(entries.items(), key=lambda item: (len(item[0]), item[0])))

    @cached_property
    def by_name(self) -> dict[str, Path]:
        """The offered paths as they are written, like `4-6-7`."""
        return {format_path(path): path for path in self.offered}

    @cached_property
    def accuracies(self) -> dict[Path, float]:
        """Validation accuracy of every offered path: what paths are chosen by."""
        return {path: entry.validation.accuracy for path, entry in self.offered.items()}

    @cached_property
    def best_by_depth(self) -> dict[int, Path]:
        """What `depth=d` means: the offered path of d blocks that is best on validation."""
        return best_by_depth(self.tree, self.accuracies)

    @cached_property
    def reference(self) -> Path:
        """The path that the others are compared with: the best on validation."""
        return reference_path(self.tree, self.accuracies)

    @cached_property
    def front(self) -> tuple[Path, ...]:
        """The Pareto front, shallowest first; the reference path is its last."""
        return pareto_front(self.tree, self.accuracies)

    @cached_property
    def climb(self) -> tuple[Path, ...]:
        """The fixed sequence of paths at which a row that goes deeper gets its answers; it ends at the reference."""
        return climb(self.tree, self.accuracies)


def file_name(path: Path) -> str:
    """The name of a path's own graph in a bundle, `path_4-6.onnx`."""
    return f"path_{format_path(path)}.onnx"


def sha256_of(file: FilePath) -> str:
    """Hash a regular file without holding it in memory."""
    digest = hashlib.sha256()
    with _open_regular(file) as opened:
        while chunk := opened.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: the manifest and, under `sha256`, the digest of its canonical JSON."""
    content = manifest.model_dump(mode="json")
    return json.dumps({**content, "sha256": _digest(content)}, indent=2, ensure_ascii=False).encode()


def load_manifest(bundle: FilePath) -> Manifest:
    """Read and check `manifest.json` (not the files that it lists: see `check_files`).

    Raises:
        BundleError: it is missing, edited, of another major format version, or not valid.
    """
    file = bundle / MANIFEST_FILE
    content = _read(file)
    claimed = content.pop("sha256", None)
    version = str(content.get("format_version"))
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise BundleError(
            f"{file}: expected format version {FORMAT_VERSION.split('.')[0]}.x, got {version}: export the bundle again"
        )
    if claimed != _digest(content):
        raise BundleError(f"{file} was edited or damaged: its digest is not the one that it carries")
    try:
        return Manifest.model_validate(content)
    except ValidationError as exc:
        problems = "; ".join(f"{'.'.join(map(str, error['loc'])) or 'manifest'}: {error['msg']}" for error in exc.errors())
        raise BundleError(f"{file}: {problems}") from exc


def check_files(bundle: FilePath, manifest: Manifest) -> None:
    """Compare every listed file with its digest.

    Raises:
        BundleError: a file is missing, truncated or changed; the message names it.
    """
    for name, expected in manifest.files.items():
        file = bundle / name
        try:
            got = sha256_of(file)
        except OSError as exc:
            raise BundleError(f"{file} cannot be read: {exc.strerror}. Copy the bundle again, whole") from exc
        if got != expected:
            raise BundleError(
                f"{file} is truncated or changed: expected SHA-256 {expected}, got {got}. Copy the bundle again, whole"
            )


def _open_regular(file: FilePath) -> BinaryIO:
    """Open what has an end: reading a pipe or a device, or a link to one, might never come back."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(file))
    return file.open("rb")


def _read(file: FilePath) -> dict[str, object]:
    try:
        with _open_regular(file) as opened:
            data = opened.read(_MAX_MANIFEST_BYTES + 1)
        content = json.loads(data.decode()) if len(data) <= _MAX_MANIFEST_BYTES else None
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair reads as JSON and is no text
    except FileNotFoundError as exc:
        raise BundleError(f"{file} is missing: {file.parent} is no bundle (`hbll export` writes one)") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise BundleError(f"{file} cannot be read as JSON: {exc}") from exc
    if len(data) > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{file}: expected at most {_MAX_MANIFEST_BYTES} bytes, got more")
    if not isinstance(content, dict):
        raise BundleError(f"{file}: expected a JSON object")
    return content


def _digest(content: dict[str, object]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
