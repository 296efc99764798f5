from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from service.profile_cache import Circumstances, ProfileCache
from service.settings import default_cache_dir
from tests.fakes import FakeClock, FakeRunner, fake_model, fake_parts

SAME = Circumstances("bundle", "processor", "runtime 1", ("CPU",), threads=1, max_batch=8)


def test_what_was_measured_is_kept_for_the_same_circumstances_only(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path / "new" / "folder")
    assert cache.load(SAME) is None
    parts = fake_parts(block_s=0.1 + 0.2)
    cache.save(SAME, parts)
    assert cache.load(SAME) == parts
    for change in (
        {"bundle": "another"},
        {"processor": "another"},
        {"runtime": "runtime 2"},
        {"providers": ("CUDA", "CPU")},
        {"threads": 2},
        {"max_batch": 16},
    ):
        assert cache.load(dataclasses.replace(SAME, **change)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"batches": [1]}'])
def test_a_damaged_file_is_warned_of_and_measured_again(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ProfileCache(tmp_path)
    cache.save(SAME, fake_parts())
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert cache.load(SAME) is None
    assert f"the saved latencies in {file} cannot be used and are measured again" in caplog.text
    cache.save(SAME, fake_parts())
    assert cache.load(SAME) == fake_parts()


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = ProfileCache(tmp_path / "file")
    cache.save(SAME, fake_parts())
    assert "cannot be kept in" in caplog.text
    assert "Set HBLL_CACHE_DIR" in caplog.text
    assert cache.load(SAME) is None


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ProfileCache(tmp_path)
    cache.save(SAME, fake_parts())
    before = list(tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    cache.save(SAME, fake_parts(block_s=2))
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == before
    assert cache.load(SAME) == fake_parts()


def warmed(cache: ProfileCache, threads: int = 1, max_batch: int = 8) -> int:
    """How many runs the warm-up of a fake model took."""
    clock = FakeClock()
    runner = FakeRunner(clock, 0.001)
    model = fake_model(runner=runner)
    model.cache, model.digest, model.threads = cache, "d", threads
    model.warm_up(max_batch, clock, lambda: False)
    assert model.profile is not None
    assert model.profile.max_batch == max_batch
    return len(runner.runs)


def test_a_second_start_measures_much_less_and_another_machine_all_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ProfileCache(tmp_path)
    first = warmed(cache)
    assert warmed(cache) < first / 4
    assert warmed(cache, threads=2) == first
    assert warmed(cache, max_batch=4) < first
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr("service.repository.processor_name", lambda: "another")
    assert warmed(cache) == first
    assert caplog.records == []


def test_a_file_of_another_family_is_not_used(tmp_path: Path) -> None:
    """As whole as a file can be, and of the wrong blocks or batches: whoever wrote it there."""
    cache = ProfileCache(tmp_path)
    first = warmed(cache)
    (file,) = tmp_path.iterdir()
    for parts in (fake_parts(range(1, 4)), fake_parts(batches=(1, 2))):
        file.write_text(parts.model_dump_json())
        assert warmed(cache) == first


def test_a_warm_up_that_was_told_to_stop_keeps_nothing(tmp_path: Path) -> None:
    clock = FakeClock()
    model = fake_model(runner=FakeRunner(clock, 0.001))
    model.cache = ProfileCache(tmp_path)
    model.warm_up(8, clock, lambda: True)
    assert model.profile is None
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_gets_the_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's arbitrary user once could not start the server."""
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert default_cache_dir().name == "hbll"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/hbll")


def test_saving_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ProfileCache(tmp_path).save(SAME, fake_parts())
    assert caplog.records == []
