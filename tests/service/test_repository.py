from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from family.manifest import BundleError
from service.errors import UnknownModel
from service.repository import open_repository
from service.settings import Settings
from tests.conftest import Trained


def test_the_highest_version_is_served(trained: Trained, tmp_path: Path) -> None:
    for version in ("2", "10"):
        shutil.copytree(trained.bundle, tmp_path / "digits" / version)
    (tmp_path / "digits" / ".11.123.tmp").mkdir()
    (tmp_path / ".git").mkdir()
    repository = open_repository(Settings(models=tmp_path))
    assert repository.get("digits").version == 10
    with pytest.raises(UnknownModel, match="no model 'cats' is served here: expected one of digits"):
        repository.get("cats")


def test_a_damaged_bundle_stops_start_up(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.bundle, tmp_path / "digits" / "1")
    weights = tmp_path / "digits" / "1" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"digits/1/weights.bin is truncated or changed"):
        open_repository(Settings(models=tmp_path))


def test_folders_that_are_no_repository_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no folder: expected a model repository"):
        open_repository(Settings(models=tmp_path / "missing"))
    with pytest.raises(BundleError, match="holds no model"):
        open_repository(Settings(models=tmp_path))
    (tmp_path / "digits").mkdir()
    with pytest.raises(BundleError, match="holds no version: expected a folder like"):
        open_repository(Settings(models=tmp_path))
    (tmp_path / "digits" / "1").mkdir()
    with pytest.raises(BundleError, match=r"manifest.json is missing"):
        open_repository(Settings(models=tmp_path))
