"""New versions while serving, by a repository whose models are fakes; a real server does it in tests/e2e."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from family.manifest import MANIFEST_FILE, BundleError, sha256_of
from service.app import create_app
from service.context import Context
from service.reload import follow
from service.repository import Repository, ServedModel
from service.settings import Settings
from tests.fakes import FakeRunner, fake_model

URL = "/v1/models/fake/predict"
BODY = {"inputs": [[[0.1, 0], [0, 0]]], "min_confidence": 1}


class Shelf:
    """A folder of empty versions, and what is found in them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.errors: dict[int, Exception] = {}
        self.loaded: list[int] = []
        self.put(1)

    def put(self, version: int, model: str = "fake") -> None:
        (self.root / model / str(version)).mkdir(parents=True)

    def take(self, version: int, model: str = "fake") -> None:
        (self.root / model / str(version)).rmdir()

    def load(self, name: str, version: int) -> ServedModel:
        self.loaded.append(version)
        if version in self.errors:
            raise self.errors[version]
        model = fake_model(runner=FakeRunner(), version=version, levels={0.05: 0.9})
        model.name = name
        return model


@asynccontextmanager
async def serving(shelf: Shelf, **settings: object) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    repository = Repository([shelf.load("fake", 1)], shelf.root, shelf.load)
    app = create_app(Settings(**settings), repository)  # type: ignore[arg-type]
    async with app.router.lifespan_context(app):
        while not app.state.context.ready:
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            yield app, http


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), timeout=60))  # type: ignore[arg-type]


async def until(happened: Callable[[], bool]) -> None:
    while not happened():
        await asyncio.sleep(0.005)


def reloads(context: Context, loaded: str, model: str = "fake") -> float:
    return float(context.metrics.registry.get_sample_value("hbll_reloads_total", {"model": model, "loaded": loaded}) or 0)


def test_a_new_version_is_served_without_one_failed_request_and_the_old_one_is_freed(shelf: Shelf) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0.02) as (app, http):
            context: Context = app.state.context
            old = weakref.ref(context.repository.get("fake").runner)
            versions: list[int] = []

            async def ask() -> None:
                while not versions or versions[-1] < 3:
                    response = await http.post(URL, json=BODY)
                    assert response.status_code == 200, response.text
                    versions.append(response.json()["version"])

            asking = [asyncio.create_task(ask()) for _ in range(4)]
            await until(lambda: len(versions) > 20)
            shelf.put(2)
            await until(lambda: versions[-1] == 2)
            shelf.put(3)
            await asyncio.gather(*asking)
            assert versions == sorted(versions)
            assert reloads(context, "true") == 2
            gc.collect()
            assert old() is None
            assert len(context.engine._dispatch.models) == 1

    run(test)


def test_the_old_version_is_freed_on_an_idle_server_too(shelf: Shelf) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0) as (app, http):
            context: Context = app.state.context
            assert (await http.post(URL, json=BODY)).status_code == 200
            old = weakref.ref(context.repository.get("fake").runner)
            shelf.put(2)
            await follow(context, "fake")
            await asyncio.sleep(0)
            await until(lambda: gc.collect() >= 0 and old() is None)

    run(test)


def test_a_damaged_version_keeps_the_old_one_is_told_of_once_and_served_when_repaired(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0.01) as (app, http):
            context: Context = app.state.context
            shelf.errors[2] = BundleError("weights.bin is truncated or changed")
            shelf.put(2)
            await until(lambda: shelf.loaded.count(2) > 5)
            assert reloads(context, "false") == 1
            assert caplog.text.count("version 2 of fake is not served: weights.bin is truncated") == 1
            assert (await http.post(URL, json=BODY)).json()["version"] == 1
            assert (await http.get("/health/ready")).status_code == 200
            shelf.errors[2] = RuntimeError("something nobody thought of")
            await until(lambda: reloads(context, "false") == 2)
            del shelf.errors[2]
            await until(lambda: context.repository.get("fake").version == 2)
            assert (await http.post(URL, json=BODY)).json()["version"] == 2

    run(test)


def test_a_served_version_that_is_written_over_is_told_of(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    """Bug found: nothing was said, and `load` answered as if it were served."""

    async def test() -> None:
        async with serving(shelf, poll_s=0) as (app, http):
            manifest = shelf.root / "fake" / "1" / MANIFEST_FILE
            manifest.write_text("one")
            app.state.context.repository.get("fake").digest = sha256_of(manifest)
            assert (await http.post("/v2/repository/models/fake/load")).status_code == 200
            manifest.write_text("another")
            for _ in range(2):
                response = await http.post("/v2/repository/models/fake/load")
                assert response.status_code == 400
                assert "export it under a new version number" in response.json()["error"]
            (entry,) = (await http.post("/v2/repository/index")).json()
            (version,) = (await http.get("/v1/models/fake/versions")).json()["versions"]
            assert (entry["state"], version["ready"]) == ("READY", True)
            assert entry["reason"] == version["reason"]
            assert entry["reason"].startswith("its folder now holds a different bundle")
            assert caplog.text.count("a different bundle") == 1
            manifest.unlink()
            shelf.take(1)
            assert (await http.post("/v2/repository/models/fake/load")).status_code == 200
            (entry,) = (await http.post("/v2/repository/index")).json()
            assert entry["reason"].startswith("its folder is gone")

    run(test)


def test_a_folder_that_cannot_be_read_does_not_end_the_watch(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0.01) as (app, _):
            hidden = shelf.root.with_name("hidden")
            shelf.root.rename(hidden)
            await until(lambda: "the repository cannot be searched for new versions" in caplog.text)
            hidden.rename(shelf.root)
            shelf.put(2)
            await until(lambda: app.state.context.repository.get("fake").version == 2)

    run(test)


def test_a_new_model_is_served_too(shelf: Shelf) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0.01) as (app, http):
            shelf.put(4, "another")
            await until(lambda: "another" in app.state.context.repository.models)
            assert (await http.post("/v1/models/another/predict", json=BODY)).json()["version"] == 4
            assert [each["name"] for each in (await http.get("/v1/models")).json()["models"]] == ["another", "fake"]

    run(test)


def test_a_model_can_be_loaded_by_request(shelf: Shelf) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0) as (app, http):
            shelf.put(2)
            shelf.errors[2] = BundleError("weights.bin is truncated or changed")
            response = await http.post("/v2/repository/models/fake/load")
            assert (response.status_code, response.json()["code"]) == (400, "bad_request")
            assert response.json()["error"] == "fake cannot be loaded: weights.bin is truncated or changed"
            assert (await http.post(URL, json=BODY)).json()["version"] == 1
            del shelf.errors[2]
            both = await asyncio.gather(*(http.post("/v2/repository/models/fake/load") for _ in range(2)))
            assert [response.status_code for response in both] == [200, 200]
            assert shelf.loaded.count(2) == 2  # one that failed, and one for both requests
            assert (await http.post(URL, json=BODY)).json()["version"] == 2
            assert reloads(app.state.context, "true") == 1
            shelf.put(1, "late")
            assert (await http.post("/v2/repository/models/late/load")).status_code == 200
            assert (await http.post("/v2/repository/models/never/load")).status_code == 404
            assert "never" not in app.state.context.repository.refused  # else each name that anybody asks for would stay
            index = (await http.post("/v2/repository/index")).json()
            assert [(entry["name"], entry["version"]) for entry in index] == [("fake", "2"), ("late", "1")]

    run(test)


def test_an_unloaded_model_answers_what_it_was_asked_is_freed_and_stays_away_until_it_is_loaded(shelf: Shelf) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0.01, versions="all") as (app, http):
            context: Context = app.state.context
            shelf.put(2)
            await until(lambda: served(context) == [2, 1])
            runner = context.repository.get("fake").runner
            assert isinstance(runner, FakeRunner)
            runner.began.clear()
            runner.go.clear()
            asking = [asyncio.create_task(http.post(URL, json=BODY)) for _ in range(3)]
            await asyncio.to_thread(runner.began.wait, 30)
            assert (await http.post("/v2/repository/models/fake/unload")).status_code == 200
            gone = await http.post(URL, json=BODY)
            assert (gone.status_code, gone.json()["code"]) == (404, "unknown_model")
            runner.go.set()
            answers = await asyncio.gather(*asking)
            assert [(each.status_code, each.json()["version"]) for each in answers] == [(200, 2)] * 3
            old = weakref.ref(runner)
            del runner
            await until(lambda: gc.collect() >= 0 and old() is None)
            assert not context.engine._dispatch.models
            shelf.put(1, "another")  # so the folder has been searched since
            await until(lambda: "another" in context.repository.models)
            shelf.put(3)  # not even what is new
            shelf.put(2, "another")
            await until(lambda: served(context, "another") == [2, 1])
            assert "fake" not in context.repository.models
            assert context.ready
            index = (await http.post("/v2/repository/index")).json()
            assert [(each["name"], each["version"], each["reason"]) for each in index] == [
                ("another", "2", ""), ("another", "1", ""), ("fake", "2", "unloaded"), ("fake", "1", "unloaded")
            ]  # fmt: skip
            assert (await http.post("/v2/repository/models/fake/load")).status_code == 200
            assert served(context) == [3, 2, 1]
            assert (await http.post(URL, json=BODY)).json()["version"] == 3
            shelf.put(4)  # it is followed again
            await until(lambda: served(context) == [4, 3, 2, 1])

    run(test)


def test_an_unloaded_model_that_cannot_be_loaded_is_told_of_as_one_that_should_be_served(shelf: Shelf) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0) as (app, http):
            shelf.errors[1] = BundleError("weights.bin is truncated or changed")
            await http.post("/v2/repository/models/fake/unload")
            assert (await http.post("/v2/repository/models/fake/load")).status_code == 400
            (entry,) = (await http.post("/v2/repository/index")).json()
            assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "weights.bin is truncated or changed")
            del shelf.errors[1]
            await follow(app.state.context, "fake")
            assert (await http.post(URL, json=BODY)).status_code == 200

    run(test)


def test_a_request_that_is_read_while_its_model_is_replaced_is_answered_by_the_old_version(shelf: Shelf) -> None:
    """The engine once had forgotten the model by then: 500."""

    async def test() -> None:
        async with serving(shelf, poll_s=0) as (app, http):
            context: Context = app.state.context
            decoding, replaced = threading.Event(), threading.Event()

            def slow(*_: object) -> object:
                decoding.set()
                assert replaced.wait(30)
                return original(*_)  # type: ignore[arg-type]

            from service.inputs import Decoder

            original = Decoder.decode
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Decoder, "decode", slow)
                body = {"inputs": BODY["inputs"] * 5}  # many: decoded in a thread
                asking = asyncio.create_task(http.post(URL, json=body))
                await asyncio.to_thread(decoding.wait, 30)
                shelf.put(2)
                await follow(context, "fake")
                await until(lambda: len(context.engine._dispatch.models) == 1)
                replaced.set()
                response = await asking
            assert (response.status_code, response.json()["version"]) == (200, 1)

    run(test)


def test_a_server_that_stops_while_it_measures_a_new_version_does_not_serve_it(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0.01) as (app, _):
            context: Context = app.state.context
            measuring = threading.Event()
            ended: list[bool] = []

            def warm_up(self: ServedModel, _: int, __: object, stop: Callable[[], bool]) -> None:
                measuring.set()
                while not stop():
                    pass
                ended.append(True)

            monkeypatch.setattr(ServedModel, "warm_up", warm_up)
            shelf.put(2)
            await asyncio.to_thread(measuring.wait, 30)
        assert context.repository.get("fake").version == 1
        await until(lambda: bool(ended))

    run(test)


def served(context: Context, model: str = "fake") -> list[int]:
    return list(context.repository.versions(model))


async def versions_of(http: httpx.AsyncClient, url: str = "/v1/models/fake") -> dict[int, object]:
    """What `/versions` tells: `True` the default, `False` served too, else why it is refused."""
    told = (await http.get(f"{url}/versions")).json()["versions"]
    return {each["version"]: each["reason"] or each["default"] for each in told}


def test_as_many_versions_are_served_as_is_set_and_each_can_be_named(shelf: Shelf) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0.01, versions=2) as (app, http):
            context: Context = app.state.context
            for version in (2, 3):
                shelf.put(version)
                await until(lambda version=version: version in served(context))
            await until(lambda: served(context) == [3, 2])
            for url, version in (
                ("/v1/models/fake", 3),
                ("/v1/models/fake/versions/3", 3),
                ("/v1/models/fake/versions/2", 2),
            ):
                assert (await http.post(f"{url}/predict", json=BODY)).json()["version"] == version
                assert (await http.get(url)).json()["version"] == version
                assert (await http.get(f"{url}/ready")).json() == {
                    "name": "fake", "version": version, "ready": True, "versions": [3, 2]
                }  # fmt: skip
            gone = await http.post("/v1/models/fake/versions/1/predict", json=BODY)
            assert (gone.status_code, gone.json()["code"], gone.json()["versions"]) == (404, "unknown_version", ["3", "2"])
            assert gone.json()["error"] == "version '1' of fake is not served here: expected 3 or 2"
            assert await versions_of(http) == {3: True, 2: False}
            assert (await http.get("/v1/models")).json()["models"][0]["versions"] == [3, 2]
            assert (await http.get("/v2/models/fake")).json()["versions"] == ["3", "2"]
            assert (await http.get("/v2/models/fake/config")).json()["version_policy"] == {"latest": {"num_versions": 2}}

    run(test)


def test_each_version_has_audits_and_statistics_of_its_own(shelf: Shelf) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0, versions="all") as (app, http):
            context: Context = app.state.context
            shelf.put(2)
            assert (await http.post("/v2/repository/models/fake/load")).status_code == 200
            for _ in range(3):
                await http.post("/v1/models/fake/versions/1/predict", json=BODY)
            stats = {each["version"]: each for each in (await http.get("/v2/models/fake/stats")).json()["model_stats"]}
            assert {version: each["inference_count"] for version, each in stats.items()} == {"2": 0, "1": 3}
            assert (await http.get("/v2/models/stats")).json()["model_stats"] == list(stats.values())
            one = (await http.get("/v2/models/fake/versions/1/stats")).json()["model_stats"]
            assert one == [stats["1"]]
            drift = context.engine.drift(context.repository.get("fake", "1"))
            assert drift is not None
            for _ in range(50):
                drift.observe(0.05, differs=True)
            audits = [
                (await http.get(f"/v1/models/fake/versions/{v}/audits")).json()["levels"][0]["audits"] for v in (1, 2)
            ]
            assert audits == [50, 0]
            assert (await http.get("/health/ready")).json()["drift_alarms"] == {"fake": [0.05]}
            await http.post("/v1/models/fake/versions/2/audits/reset")
            assert (await http.get("/health/ready")).json()["drift_alarms"] == {"fake": [0.05]}
            text = (await http.get("/metrics")).text
            assert 'hbll_drift_alarm{epsilon="0.05",model="fake",version="1"} 1.0' in text
            shelf.take(1)
            await follow(context, "fake")
            assert (await http.get("/health/ready")).json()["drift_alarms"] == {}
            assert 'hbll_drift_alarm{epsilon="0.05",model="fake",version="1"}' not in (await http.get("/metrics")).text
            assert 'version="1"' not in (await http.get("/metrics")).text

    run(test)


def test_without_the_newest_version_the_one_before_is_served_again_without_one_failed_request(shelf: Shelf) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0.02) as (app, http):
            shelf.put(2)
            await until(lambda: served(app.state.context) == [2])
            versions: list[int] = []

            async def ask() -> None:
                while not versions or versions[-1] == 2:
                    response = await http.post(URL, json=BODY)
                    assert response.status_code == 200, response.text
                    versions.append(response.json()["version"])

            asking = [asyncio.create_task(ask()) for _ in range(4)]
            await until(lambda: len(versions) > 20)
            shelf.take(2)
            await asyncio.gather(*asking)
            assert set(versions) == {1, 2}
            await until(lambda: len(app.state.context.engine._dispatch.models) == 1)
            assert served(app.state.context) == [1]

    run(test)


def test_the_last_version_is_served_whatever_becomes_of_its_folder(shelf: Shelf) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0, versions="all") as (app, http):
            context: Context = app.state.context
            shelf.put(2)
            await follow(context, "fake")
            shelf.take(1)
            await follow(context, "fake")
            assert served(context) == [2]
            shelf.take(2)
            await follow(context, "fake")
            (shelf.root / "fake").rmdir()
            await follow(context, "fake")
            assert (await http.post(URL, json=BODY)).json()["version"] == 2

    run(test)


def test_a_damaged_version_takes_no_other_ones_place_and_is_listed_with_the_reason(shelf: Shelf) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0, versions=2) as (app, http):
            context: Context = app.state.context
            shelf.put(2)
            shelf.put(3)
            shelf.errors[3] = BundleError("weights.bin is truncated or changed")
            await follow(context, "fake")
            assert await versions_of(http) == {3: "weights.bin is truncated or changed", 2: True, 1: False}
            index = (await http.post("/v2/repository/index")).json()
            assert [(each["version"], each["state"], each["reason"]) for each in index] == [
                ("2", "READY", ""), ("1", "READY", ""), ("3", "UNAVAILABLE", "weights.bin is truncated or changed")
            ]  # fmt: skip
            assert (await http.get("/v1/models/fake/versions/3/ready")).status_code == 404
            del shelf.errors[3]
            await follow(context, "fake")
            assert await versions_of(http) == {3: True, 2: False}
            shelf.take(3)
            shelf.errors[1] = BundleError("manifest.json is missing")
            await follow(context, "fake")  # 1 would be next, and cannot be loaded any more
            assert await versions_of(http) == {2: True, 1: "manifest.json is missing"}

    run(test)


def test_a_model_that_comes_later_gets_its_own_settings(shelf: Shelf) -> None:
    async def test() -> None:
        async with serving(shelf, poll_s=0.01, per_model={"another": {"versions": [2, 4]}}) as (app, http):
            for version in (2, 3, 4, 5):
                shelf.put(version, "another")
            await until(lambda: "another" in app.state.context.repository.models)
            await until(lambda: served(app.state.context, "another") == [4, 2])
            told = (await http.get("/v1/models/another/versions")).json()
            assert told["policy"] == [2, 4]

    run(test)
