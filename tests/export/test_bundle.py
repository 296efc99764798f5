from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from scipy.stats import binom

import export.verify
from export.bundle import choose_paths, export_bundle
from export.certify import EPSILONS, disagreements
from export.graph import ALIGNMENT
from export.verify import verify_bundle
from family.manifest import BundleError, check_files, load_manifest
from family.tree import InvalidPath, Tree, format_path
from tests.conftest import Trained
from training.checkpoint import Origin, Progress, load_family, load_origin
from training.config import MlpConfig, ResMlpConfig, RunConfig, TrainConfig
from training.dataset import Dataset
from training.digits import DIGITS
from training.evaluate import score_paths
from training.model import build_family
from training.trainer import train


def test_the_bundle_is_whole_and_holds_every_path(trained: Trained) -> None:
    manifest = trained.manifest
    check_files(trained.bundle, manifest)
    assert set(manifest.offered) == set(Tree(3).paths())
    assert {file.name for file in trained.bundle.iterdir()} == {*manifest.files, "manifest.json"}
    assert {file.name for file in trained.models.joinpath("digits").iterdir()} == {"1"}


def test_every_path_agrees_in_all_forms_with_torch(trained: Trained) -> None:
    _, family, _ = load_family(trained.run)
    differences = verify_bundle(trained.bundle, trained.manifest, family, lambda _: None)
    assert len(differences) == 25
    assert all(max(d.gated, d.continued, d.torch) < 1e-5 for d in differences if d.torch is not None)


def test_weights_lie_once_and_aligned(trained: Trained) -> None:
    places: dict[str, tuple[int, int]] = {}
    for file in trained.bundle.glob("*.onnx"):
        model = onnx.load(file, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                assert entries["location"] == "weights.bin"
                place = int(entries["offset"]), int(entries["length"])
                assert places.setdefault(tensor.name, place) == place
                assert place[0] % ALIGNMENT == 0
            elif tensor.data_type == onnx.TensorProto.FLOAT:
                assert tensor.name == "no_logits" or not tensor.dims, f"{tensor.name} is a weight inside {file.name}"
    assert sum(length for _, length in places.values()) >= 0.95 * 4 * trained.manifest.offered[Tree(3).full].parameters
    spans = sorted(set(places.values()))  # equal weights lie once
    assert all(a + length <= b for (a, length), (b, _) in pairwise(spans))
    assert (trained.bundle / "weights.bin").stat().st_size == spans[-1][0] + spans[-1][1]


def test_a_paths_graph_is_complete_by_itself(trained: Trained, digits: Dataset) -> None:
    """As any ONNX user would: one file, one session, a free batch axis; accuracy as the manifest says."""
    for path in ((4,), (4, 6, 7), (1, 2, 3, 4, 5, 6, 7)):
        entry = trained.manifest.offered[path]
        session = ort.InferenceSession(str(trained.bundle / entry.file), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"x": digits.test.x.numpy()})
        assert logits.shape == (1000, 10)
        accuracy = float((logits.argmax(axis=1) == digits.test.labels.numpy()).mean())
        assert accuracy == pytest.approx(entry.test.accuracy, abs=0.001)


def test_metrics_are_measured_against_the_reference(trained: Trained) -> None:
    manifest = trained.manifest
    reference = manifest.offered[manifest.reference]
    assert reference.validation.agreement == 1
    assert reference.validation.accuracy == max(manifest.accuracies.values())
    assert {entry.validation.agreement for entry in manifest.paths} != {1.0}
    assert manifest.provenance.block_evaluations >= 30 * 3000


def test_the_certificate_holds_on_the_split_that_made_it(trained: Trained, digits: Dataset) -> None:
    """By the graphs themselves: at each level's threshold the certification rows disagree at most as often as the
    binomial test allows, far less than epsilon."""
    manifest = trained.manifest
    certificate = manifest.certificate
    assert certificate is not None
    assert certificate.rows == 500
    assert certificate.levels
    x = digits.certification.x.numpy()
    confidences, answers = [], []
    for path in manifest.climb:
        session = ort.InferenceSession(
            str(trained.bundle / manifest.offered[path].file), providers=["CPUExecutionProvider"]
        )
        logits = session.run(None, {"x": x})[0] / manifest.offered[path].temperature
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        confidences.append(probabilities.max(axis=1))
        answers.append(probabilities.argmax(axis=1))
    thresholds = [level.threshold for level in certificate.levels]
    counts = disagreements(np.stack(confidences), np.stack(answers), thresholds)
    for level, count in zip(certificate.levels, counts, strict=True):
        assert binom.cdf(count, 500, level.epsilon) <= certificate.delta / len(EPSILONS)
        assert count / 500 < level.epsilon


def test_graphs_carry_no_paths_of_the_machine_that_made_them(trained: Trained) -> None:
    for file in trained.bundle.iterdir():
        assert str(Path.cwd()).encode() not in file.read_bytes(), file.name
        assert b"site-packages" not in file.read_bytes(), file.name


def test_an_existing_bundle_is_kept_unless_replaced(trained: Trained, digits: Dataset, tmp_path: Path) -> None:
    target = tmp_path / "1"
    shutil.copytree(trained.bundle, target)
    loaded = (*load_family(trained.run), load_origin(trained.run))
    with pytest.raises(BundleError, match="add --replace"):
        export_bundle(*loaded, digits, target)
    assert len(load_manifest(target).offered) == 25
    export_bundle(*loaded, digits, target, paths="4", replace=True)
    assert [format_path(path) for path in load_manifest(target).offered] == ["4"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_no_bundle_is_never_replaced(trained: Trained, digits: Dataset, tmp_path: Path) -> None:
    """`--replace` on models/digits, the version forgotten, once deleted all versions."""
    shutil.copytree(trained.bundle, tmp_path / "digits" / "1")
    loaded = (*load_family(trained.run), load_origin(trained.run))
    with pytest.raises(BundleError, match="is no bundle, so it is not replaced"):
        export_bundle(*loaded, digits, tmp_path / "digits", paths="4", replace=True)
    check_files(tmp_path / "digits" / "1", trained.manifest)


def test_a_bundle_that_a_killed_replacement_put_aside_comes_back(trained: Trained, digits: Dataset, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    shutil.copytree(trained.bundle, tmp_path / f".1.{ended.pid}.old")
    (tmp_path / f".1.{ended.pid}.new").mkdir()
    (tmp_path / f".1.5.{ended.pid}.new").mkdir()  # of another target, 1.5
    (tmp_path / f".1.{os.getppid()}.new").mkdir()  # of a live process
    loaded = (*load_family(trained.run), load_origin(trained.run))
    with pytest.raises(BundleError, match="add --replace"):
        export_bundle(*loaded, digits, tmp_path / "1")
    check_files(tmp_path / "1", trained.manifest)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"1", f".1.5.{ended.pid}.new", f".1.{os.getppid()}.new"}


def test_what_a_killed_process_of_our_number_left_is_not_ours(trained: Trained, digits: Dataset, tmp_path: Path) -> None:
    """Bug found: in a container the next export has the same number, took the leftover for a live one's, and failed for ever."""
    shutil.copytree(trained.bundle, tmp_path / f".1.{os.getpid()}.old")
    (tmp_path / f".1.{os.getpid()}.new").mkdir()
    loaded = (*load_family(trained.run), load_origin(trained.run))
    export_bundle(*loaded, digits, tmp_path / "1", paths="4", replace=True)
    assert list(load_manifest(tmp_path / "1").offered) == [(4,)]
    assert [file.name for file in tmp_path.iterdir()] == ["1"]


def test_a_failed_export_leaves_nothing(
    trained: Trained, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that does not agree with torch never appears: here torch is another model than the one exported."""
    config, family, progress = load_family(trained.run)
    other = load_family(trained.run)[1]
    with torch.no_grad():
        other.blocks.get_parameter("up_weight").mul_(1.5)
    real = verify_bundle
    monkeypatch.setattr("export.bundle.verify_bundle", lambda b, m, _, advance: real(b, m, other, advance))
    with pytest.raises(BundleError, match=r"path 4 and the torch model differ by .*, expected at most 0.0001"):
        export_bundle(config, family, progress, load_origin(trained.run), digits, tmp_path / "1", paths="4")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_half_written(trained: Trained, tmp_path: Path) -> None:
    """A real process, a real SIGKILL in the middle of writing; the next export cleans up and succeeds."""
    target = tmp_path / "models" / "digits" / "1"
    command = [sys.executable, "-m", "hbll", "export", str(trained.run), str(target), "--paths", "ladder"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("models/digits/.1.*.new/family.onnx")) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    assert not target.exists()
    assert list(tmp_path.glob("models/digits/.1.*.new/weights.bin"))
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert [file.name for file in target.parent.iterdir()] == ["1"]
    check_files(target, load_manifest(target))


def test_verify_finds_graphs_that_differ(trained: Trained, tmp_path: Path) -> None:
    """Two paths' files exchanged, with digests to match: whole by the manifest, and wrong."""
    bundle = tmp_path / "1"
    shutil.copytree(trained.bundle, bundle)
    a, b = bundle / "path_4.onnx", bundle / "path_4-6.onnx"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(BundleError, match=r"path 4 and the gated graph differ"):
        verify_bundle(bundle, trained.manifest, None, lambda _: None)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_sigmoid_network_exports_too(depth: int, digits: Dataset, tmp_path: Path) -> None:
    config = RunConfig(model=MlpConfig(hierarchy_depth=depth, width=12))
    family = build_family(config.model, seed=1)
    exported = export_bundle(config, family, Progress(), Origin.here(), digits, tmp_path / "1")
    assert len(exported.differences) == Tree(depth).count_paths()


def test_a_trained_residual_network_exports_in_all_forms(digits: Dataset, tmp_path: Path) -> None:
    """Path graphs, the gated graph whole and continued, and torch agree; the manifest's accuracies are the family's."""
    config = RunConfig(
        model=ResMlpConfig(hierarchy_depth=2, width=16, hidden=24),
        train=TrainConfig(method="chains", budget=6, batch=64, lr=3e-3, evaluations=1),
    )
    family = train(config, tmp_path / "run", digits, lambda _: None)
    loaded = (*load_family(tmp_path / "run"), load_origin(tmp_path / "run"))
    exported = export_bundle(*loaded, digits, tmp_path / "1")
    assert len(exported.differences) == 4
    assert all(max(d.gated, d.continued, d.torch) < 1e-5 for d in exported.differences if d.torch is not None)
    scores = score_paths(family, digits.test, Tree(2).paths())
    accuracies = {path: entry.test.accuracy for path, entry in exported.manifest.offered.items()}
    assert accuracies == pytest.approx({path: result.accuracy for path, result in scores.items()}, abs=0.001)
    assert min(accuracies.values()) > 0.2


def test_a_single_network_exports_its_one_path(digits: Dataset, tmp_path: Path) -> None:
    config = RunConfig(model=MlpConfig(hierarchy_depth=2, width=12), train=TrainConfig(method="bp", blocks=3))
    exported = export_bundle(config, build_family(config.model, 1), Progress(), Origin.here(), digits, tmp_path / "1")
    assert list(exported.manifest.offered) == [(1, 2, 3)]
    with pytest.raises(BundleError, match="trained no path of the ladder: it has 1-2-3"):
        export_bundle(
            config, build_family(config.model, 1), Progress(), Origin.here(), digits, tmp_path / "2", paths="ladder"
        )


def test_a_family_that_gives_nan_is_not_exported(digits: Dataset, tmp_path: Path) -> None:
    config = RunConfig(model=MlpConfig(hierarchy_depth=1, width=12))
    family = build_family(config.model, seed=1)
    with torch.no_grad():
        family.blocks.get_parameter("bias").fill_(float("nan"))
    with pytest.raises(BundleError, match="path 1 of this family gives NaN"):
        export_bundle(config, family, Progress(), Origin.here(), digits, tmp_path / "1")
    assert list(tmp_path.iterdir()) == []


def test_verify_does_not_take_nan_for_equal(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """max(0, NaN) is 0: a graph that gave nothing but NaN once passed."""
    real = export.verify._run_gated
    monkeypatch.setattr("export.verify._run_gated", lambda *a, **k: tuple(v * np.float32("nan") for v in real(*a, **k)))
    with pytest.raises(BundleError, match="path 4 and the gated graph differ by inf"):
        verify_bundle(trained.bundle, trained.manifest, None, lambda _: None)


def test_verify_refuses_a_checkpoint_of_another_tree(trained: Trained) -> None:
    other = build_family(MlpConfig(hierarchy_depth=2, width=12), seed=1)
    with pytest.raises(BundleError, match="has hierarchy depth 3, the checkpoint 2"):
        verify_bundle(trained.bundle, trained.manifest, other, lambda _: None)


@pytest.mark.parametrize("change", [{"input_shape": (3, 28, 28)}, {"input_shape": (14, 14)}, {"labels": ("a", "b")}])
def test_verify_refuses_a_checkpoint_of_other_rows_or_classes(trained: Trained, change: dict[str, object]) -> None:
    """Bug found: of the same depth, it was torch's error about shapes, or a difference of inf."""
    other = build_family(ResMlpConfig(hierarchy_depth=3, width=12), 1, DIGITS.model_copy(update=change))
    with pytest.raises(
        BundleError, match=r"(takes rows of \[28, 28\], the checkpoint others|has 10 classes, the checkpoint 2)"
    ):
        verify_bundle(trained.bundle, trained.manifest, other, lambda _: None)


ACCURACIES = {path: 0.5 + 0.01 * len(path) for path in Tree(3).paths()}


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("ladder", {(4,), (4, 6), (4, 6, 7)}),
        ("4-6-7, 4", {(4,), (4, 6, 7)}),
        ("all", set(ACCURACIES)),
        ("default", set(ACCURACIES)),
    ],
)
def test_paths_are_chosen_by_name(wish: str, expected: set[tuple[int, ...]]) -> None:
    assert set(choose_paths(Tree(3), ACCURACIES, wish)) == expected


def test_larger_families_export_their_front_and_ladder() -> None:
    tree = Tree(4)
    accuracies = {path: 0.5 + 0.01 * min(len(path), 9) for path in tree.paths()}
    chosen = choose_paths(tree, accuracies, "default")
    assert set(tree.ladder) <= set(chosen)
    assert {len(path) for path in chosen} == set(range(1, 10))
    assert len(chosen) < 15


def test_paths_that_do_not_exist_or_were_not_trained_are_refused() -> None:
    with pytest.raises(InvalidPath, match="4 -> 7 is no hop"):
        choose_paths(Tree(3), ACCURACIES, "4-7")
    with pytest.raises(BundleError, match="did not train the path 4-6"):
        choose_paths(Tree(3), {(4,): 0.5}, "4-6")


def test_manifest_is_plain_json(trained: Trained) -> None:
    content = json.loads((trained.bundle / "manifest.json").read_text())
    assert content["format_version"] == "1.2"
    assert {"torch", "onnx"} <= content["provenance"]["libraries"].keys()
