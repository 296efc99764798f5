"""The real app with the real bundle, in this process, spoken to by httpx."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.logs import ACCESS_LOGGER
from service.settings import Settings
from tests.conftest import Trained

_PATIENCE_S = 180
"""A start measures the models, which a machine that others use as well may take a minute for."""


class Client:
    """httpx against the app, from synchronous tests: the app's loop runs in a thread of its own, until this is closed, which
    it is as a context manager."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._lifespan = app.router.lifespan_context(app)
        try:
            self.run(self._start())
        except BaseException:
            self._end_loop()  # else the thread would outlive the tests
            raise
        self.rpc = app.state.rpc and f"127.0.0.1:{app.state.rpc.port}"
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://test")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, method: str, url: str, **options: object) -> httpx.Response:
        return self.run(self._http.request(method, url, **options))

    def get(self, url: str) -> httpx.Response:
        return self.request("GET", url)

    def predict(self, body: object, model: str = "digits") -> httpx.Response:
        content = json.dumps(body).encode()  # ASCII: what cannot be sent as UTF-8 is escaped
        headers = {"content-type": "application/json"}
        return self.request("POST", f"/v1/models/{model}/predict", content=content, headers=headers)

    def close(self) -> None:
        self.run(self._http.aclose())
        self.run(self._lifespan.__aexit__(None, None, None))
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        await self._lifespan.__aenter__()
        while not self.app.state.context.ready:
            await asyncio.sleep(0.01)

    def run(self, coroutine: object) -> object:
        """On the app's loop."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)  # type: ignore[arg-type]
        try:
            return future.result(timeout=_PATIENCE_S)
        except TimeoutError:
            raise AssertionError(f"the app has not done within {_PATIENCE_S} s what it was asked to") from None


@pytest.fixture(scope="package")
def settings(trained: Trained) -> Settings:
    return Settings(models=trained.models, max_body_bytes=400_000, max_request_rows=40, max_queue_rows=64, grpc_port=0)


@pytest.fixture(scope="package")
def client(settings: Settings) -> Iterator[Client]:
    with Client(create_app(settings)) as client:
        yield client


@contextmanager
def left_to_the_collector() -> Iterator[set[str]]:
    """The functions of the server's side whose calls, with all that they have, wait for a collection of garbage after what is
    done within; known afterwards. Whole collections are rare: until then a body, say, stays in memory."""
    found: set[str] = set()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        codes = [thing.f_code for thing in gc.garbage if isinstance(thing, FrameType)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    ours = ("/service/", "/fastapi/", "/starlette/")
    found |= {code.co_qualname for code in codes if any(part in code.co_filename for part in ours)}


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """Of the access log."""
    handler, logger = _Lines(), logging.getLogger(ACCESS_LOGGER)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.records
    logger.removeHandler(handler)
    logger.setLevel(level)
