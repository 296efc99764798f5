from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from family.manifest import BundleError
from service.errors import UnknownModel, UnknownVersion
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


def test_as_many_versions_are_opened_as_is_set(trained: Trained, tmp_path: Path) -> None:
    for version in ("1", "2", "10"):
        shutil.copytree(trained.bundle, tmp_path / "digits" / version)
    shutil.copytree(trained.bundle, tmp_path / "other" / "7")
    own = {"other": {"versions": "all"}}
    repository = open_repository(Settings(models=tmp_path, versions=2, per_model=own))
    assert [(model.name, model.version) for model in repository.served] == [("digits", 10), ("digits", 2), ("other", 7)]
    assert {name: model.version for name, model in repository.models.items()} == {"digits": 10, "other": 7}
    assert repository.get("digits", "2").version == 2
    for version in ("1", "02", "", "2.0"):
        with pytest.raises(UnknownVersion, match="of digits is not served here: expected 10 or 2"):
            repository.get("digits", version)


def test_what_is_set_and_not_there_is_a_mistake_unless_it_may_come_later(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(trained.bundle, tmp_path / "digits" / "1")
    unknown = {"digitz": {"min_depth": 2}}
    message = f"per_model: {tmp_path} holds no model digitz, only digits"
    with pytest.raises(BundleError, match=re.escape(message)):
        open_repository(Settings(models=tmp_path, per_model=unknown, poll_s=0))
    assert open_repository(Settings(models=tmp_path, per_model=unknown)).models
    assert f"{message}: is that a mistake?" in caplog.text
    named = {"digits": {"versions": [1, 3]}}
    message = f"model digits: {tmp_path / 'digits'} does not hold version 3, only 1"
    with pytest.raises(BundleError, match=re.escape(message)):
        open_repository(Settings(models=tmp_path, per_model=named, poll_s=0))
    assert open_repository(Settings(models=tmp_path, per_model=named)).get("digits").version == 1
    assert f"{message}: is that a mistake?" in caplog.text
    with pytest.raises(BundleError, match=r"holds none of the versions \(3,\), only 1"):
        open_repository(Settings(models=tmp_path, versions=(3,)))


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
    for place in ("digits/1", "digits"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "digits" / "1" / "manifest.json").touch()
        with pytest.raises(BundleError, match=f"is one (bundle|model): expected the folder of all models, {tmp_path}$"):
            open_repository(Settings(models=tmp_path / place))
    shutil.rmtree(tmp_path / "digits")
    (tmp_path / "digits").mkdir()
    with pytest.raises(BundleError, match="holds no version: expected a folder like"):
        open_repository(Settings(models=tmp_path))
    (tmp_path / "digits" / "1").mkdir()
    with pytest.raises(BundleError, match=r"manifest.json is missing"):
        open_repository(Settings(models=tmp_path))
