from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from family.manifest import (
    MANIFEST_FILE,
    BundleError,
    Manifest,
    check_files,
    dump_manifest,
    load_manifest,
    sha256_of,
)
from family.tree import Tree
from tests.fakes import fake_manifest, rising_accuracies


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder whose manifest is right and whose files are small."""
    manifest = fake_manifest(rising_accuracies(Tree(2)), hierarchy_depth=2)
    for name in manifest.files:
        (tmp_path / name).write_bytes(name.encode())
    files = {name: sha256_of(tmp_path / name) for name in manifest.files}
    (tmp_path / MANIFEST_FILE).write_bytes(dump_manifest(manifest.model_copy(update={"files": files})))
    return tmp_path


def _edit(bundle: Path, **changes: object) -> None:
    """Change the manifest and give it the digest that belongs to the change, as a careful forger would."""
    content = json.loads((bundle / MANIFEST_FILE).read_text())
    content.pop("sha256")
    content |= changes
    from family.manifest import _digest

    (bundle / MANIFEST_FILE).write_text(json.dumps({**content, "sha256": _digest(content)}))


def test_a_whole_bundle_is_accepted_and_comes_back_equal(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    check_files(bundle, manifest)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize("name", ["weights.bin", "family.onnx", "path_2.onnx"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} cannot be read"):
        check_files(bundle, load_manifest(bundle))


def test_a_truncated_file_is_named(bundle: Path) -> None:
    (bundle / "weights.bin").write_bytes(b"w")
    with pytest.raises(BundleError, match=r"weights.bin is truncated or changed: expected SHA-256"):
        check_files(bundle, load_manifest(bundle))


@pytest.mark.parametrize("name", ["weights.bin", MANIFEST_FILE])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_not_read(bundle: Path, name: str, kind: str) -> None:
    """Bug found: a pipe was waited for, for ever, and a link to /dev/zero read until the memory was full."""
    manifest = load_manifest(bundle)
    (bundle / name).unlink()
    if kind == "pipe":
        os.mkfifo(bundle / name)
    else:
        (bundle / name).symlink_to("/dev/full")  # of no length, like /dev/zero
    with pytest.raises(BundleError, match=rf"{name} cannot be read.*no regular file"):
        check_files(bundle, manifest if name != MANIFEST_FILE else load_manifest(bundle))


def test_an_edited_manifest_is_refused(bundle: Path) -> None:
    text = (bundle / MANIFEST_FILE).read_text()
    (bundle / MANIFEST_FILE).write_text(text.replace('"accuracy": 0.61', '"accuracy": 0.99'))
    assert (bundle / MANIFEST_FILE).read_text() != text
    with pytest.raises(BundleError, match="was edited or damaged"):
        load_manifest(bundle)


def test_a_missing_manifest_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="`hbll export` writes one"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", "[" * 100_000, '{"a": NaN}', '{"a": "\\ud800"}', '{"a": ' + "9" * 5000 + "}"]
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(content)
    with pytest.raises(BundleError, match=MANIFEST_FILE):
        load_manifest(tmp_path)


def test_another_major_version_is_refused_and_a_minor_one_is_not(bundle: Path) -> None:
    _edit(bundle, format_version="2.0")
    with pytest.raises(BundleError, match=r"expected format version 1.x, got 2.0"):
        load_manifest(bundle)
    _edit(bundle, format_version="1.7", thresholds={"0.01": 0.9})
    assert load_manifest(bundle).format_version == "1.7"


@pytest.mark.parametrize("name", ["../weights.bin", "/etc/passwd", "a/b", ".hidden", ""])
def test_a_file_outside_the_bundle_cannot_be_named(bundle: Path, name: str) -> None:
    files = load_manifest(bundle).files
    _edit(bundle, files={**files, name: "0" * 64})
    with pytest.raises(BundleError, match=r"files\."):
        load_manifest(bundle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "02"}, "expected path 2 in path_2.onnx, got 02 in path_2.onnx"),
        ({"file": "weights.bin"}, "expected path 2 in path_2.onnx, got 2 in weights.bin"),
    ],
)
def test_a_path_has_one_name_and_one_file(bundle: Path, changes: dict[str, str], message: str) -> None:
    content = json.loads((bundle / MANIFEST_FILE).read_text())
    entry = next(entry for entry in content["paths"] if entry["path"] == "2")
    entry |= changes
    _edit(bundle, paths=content["paths"])
    with pytest.raises(BundleError, match=message):
        load_manifest(bundle)


def test_a_shape_without_axes_is_refused(bundle: Path) -> None:
    _edit(bundle, output={"name": "logits", "datatype": "FP32", "shape": []})
    with pytest.raises(BundleError, match=r"output.shape"):
        load_manifest(bundle)


@pytest.mark.parametrize(("datatype", "vocabulary"), [("INT64", None), ("FP32", 256)])
def test_a_vocabulary_goes_with_tokens(bundle: Path, datatype: str, vocabulary: int | None) -> None:
    shape = json.loads((bundle / MANIFEST_FILE).read_text())["input"]["shape"]
    _edit(bundle, input={"name": "x", "datatype": datatype, "shape": shape}, vocabulary=vocabulary)
    with pytest.raises(BundleError, match="expected a vocabulary for tokens, INT64, and for nothing else"):
        load_manifest(bundle)


def test_labels_are_each_another(bundle: Path) -> None:
    """Bug found: probabilities of two classes of one name were told as one's."""
    labels = load_manifest(bundle).labels
    _edit(bundle, labels=[labels[0]] * len(labels))
    with pytest.raises(BundleError, match=f"expected labels each another, got {len(labels)} with 1 different"):
        load_manifest(bundle)


def test_paths_must_be_of_the_tree(bundle: Path) -> None:
    content = json.loads((bundle / MANIFEST_FILE).read_text())
    content["paths"][0]["path"] = "1-3"
    _edit(bundle, paths=content["paths"])
    with pytest.raises(BundleError, match="1 -> 3 is no hop"):
        load_manifest(bundle)


def test_a_certificate_must_be_for_the_sequence_that_is_climbed(bundle: Path) -> None:
    certificate = {"sequence": ["2"], "delta": 0.05, "rows": 500, "levels": []}
    _edit(bundle, certificate=certificate)
    with pytest.raises(BundleError, match="the certificate is for"):
        load_manifest(bundle)
