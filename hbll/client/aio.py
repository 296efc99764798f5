"""`AsyncClient`: what callers see. What to send and what an answer means is for `requests`, `inputs` and `answers` to say,
how it is sent for `sending`."""

from __future__ import annotations

import ssl
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import anyio
import httpx

from hbll.client.answers import (
    Answer,
    Memory,
    Model,
    ModelDetail,
    Path,
    Plan,
    PlannedAnswer,
    Prediction,
    Readiness,
    Rung,
    read,
    read_all,
    read_answer,
)
from hbll.client.attempts import Attempts
from hbll.client.errors import InvalidRequest, NotServed, Unavailable, error_in_stream
from hbll.client.events import read_events
from hbll.client.inputs import Inputs, Row, holds_arrays, rows_of, takes_long
from hbll.client.requests import (
    PredictOptions,
    Request,
    StreamOptions,
    Wishes,
    budget_of,
    check_options,
    content_of,
    model_path,
    plan_request,
    predict_request,
    stream_request,
)
from hbll.client.sending import Call, Sender

DEFAULT_URL = "http://127.0.0.1:8000"

_CONNECT_S = 5.0
"""How long one connection may take, so that an address that swallows packets leaves time for another attempt."""


class ClientOptions(TypedDict, total=False):
    """The arguments of `AsyncClient` but for the URL."""

    api_key: str | None
    timeout_s: float
    retries: int
    hedge_after_s: float | None
    verify: ssl.SSLContext | bool
    headers: Mapping[str, str] | None
    transport: httpx.AsyncBaseTransport | None


class AsyncClient:
    """Asks a server; for any number of asyncio's tasks at once.

    Args:
        base_url: of the server, with a prefix if a proxy puts one before it; `http://` may be left out.
        api_key: sent as `Authorization: Bearer ...`; never shown nor logged.
        timeout_s: how long a call may take with all its attempts, and a stream from its beginning to its end.
        retries: how often a call is tried again after 408, 429, 502, 503 and failed connections, with backoff, not before
            the server's Retry-After, and only while its deadline and its budget leave time. Also if a connection broke
            after the request was sent: predictions change nothing at the server, so asking twice does no harm.
        hedge_after_s: send a second, identical request if the first has no answer after that long, and take what comes
            first; the other is given up, and the server drops it. It buys a better tail with more load: off by default.
        verify: of TLS; an `ssl.SSLContext` for certificates of one's own.
        headers: sent with everything.
        transport: of httpx, for tests.

    Every method raises `HbllError`, see `hbll.client.errors`.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 10.0,
        retries: int = 3,
        hedge_after_s: float | None = None,
        verify: ssl.SSLContext | bool = True,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if "://" not in base_url:  # as tritonclient's are written
            base_url = f"http://{base_url}"
        own = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        try:
            self._http = httpx.AsyncClient(
                base_url=base_url,
                headers={**(headers or {}), **own},
                timeout=httpx.Timeout(None, connect=_CONNECT_S),  # each call has a deadline, which bounds all of it
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
                verify=verify,
                transport=transport,
            )
        except httpx.InvalidURL as exc:
            raise InvalidRequest(f"base_url: {exc}") from exc
        except UnicodeEncodeError:  # which has the key in it
            raise InvalidRequest("api_key and headers: expected ASCII, which is all that HTTP carries there") from None
        self._sender = Sender(self._http, hedge_after_s)
        self._timeout_s = timeout_s
        self._retries = retries
        self._only: str | None = None
        self._details: dict[tuple[str, int | None], ModelDetail] = {}

    async def predict(self, inputs: Inputs, *, model: str | None = None, **options: Unpack[PredictOptions]) -> Answer:
        """The answer to `inputs`: one array of the model's input shape or a batch of them, an image file as bytes or path,
        an image of PIL, or a sequence of any of these.

        Without `model` the only one that is served. `latency_budget_ms` is counted from here: what is spent before a
        request goes out, by asking for the model's shape or by earlier attempts, is taken off what the server gets. The
        way there and back is not, because nobody knows it beforehand; `deadline_met` tells.

        Arrays alone are sent as raw FP32, which is the quickest; the first call with an array asks what shape the model
        takes, unless `model` was called before.
        """
        check_options(options, PredictOptions)
        call = self._open(options)
        with self._sender.deadline(call):
            name, rows = await self._resolve(call, inputs, model, options.get("version"))
            request = predict_request(name, rows, options)
            with self._forgetting(name):
                content = await self._sender.ask(call, request, hedge=True)
            return self._answer(call, content, read_all(Prediction, content, "predictions"), len(rows))

    async def stream(
        self, inputs: Inputs, *, model: str | None = None, **options: Unpack[StreamOptions]
    ) -> AsyncGenerator[Rung | Answer]:
        """The answer of every row at every rung as soon as it is known, then the `Answer`, which `predict` would have been.

        The request is sent when the first is asked for. Closing the generator (`contextlib.aclosing`), or leaving the loop,
        stops the server's work at the next rung. Attempts are repeated until the first event; hedged they are not.
        """
        check_options(options, StreamOptions)
        call = self._open(options)
        with self._sender.deadline(call):
            name, rows = await self._resolve(call, inputs, model, options.get("version"))
            request = stream_request(name, rows, options)
            with self._forgetting(name):
                response = await self._sender.open(call, request)
        events = read_events(response.aiter_text())
        final: dict[int, Prediction] = {}
        try:
            event: Rung | Answer | None = None
            while not isinstance(event, Answer):
                with self._sender.deadline(call):  # a scope of its own for each: none may be held across a `yield`
                    event = await self._event(call, events, final, len(rows))
                yield event
        finally:
            with anyio.CancelScope(shield=True):
                await events.aclose()
                await response.aclose()

    async def plan(
        self, model: str | None = None, *, version: int | None = None, rows: int = 1, **wishes: Unpack[Wishes]
    ) -> Plan:
        """What a request of `rows` rows with these wishes would get now, and why. Nothing runs."""
        check_options(wishes, Wishes)
        call = self._open({})
        with self._sender.deadline(call):
            name = await self._name(call, model)
            with self._forgetting(name):
                content = await self._sender.ask(call, plan_request(name, version, rows, wishes))
            return read(Plan, content, answers=read_all(PlannedAnswer, content, "answers"))

    async def models(self) -> tuple[Model, ...]:
        """What is served."""
        call = self._open({})
        with self._sender.deadline(call):
            return await self._list(call)

    async def model(self, name: str, *, version: int | None = None) -> ModelDetail:
        """What a model offers. Its input shape is kept for later calls."""
        call = self._open({})
        with self._sender.deadline(call):
            return await self._describe(call, name, version)

    async def ready(self) -> Readiness:
        """Whether the server takes requests. Tried once.

        Raises:
            Unavailable: there is no server to ask.
        """
        call = self._open({})
        with self._sender.deadline(call), self._sender.reached():
            response = await self._http.get("/health/ready", headers={"X-Request-Id": call.request_id})
            try:
                content = content_of(response.status_code, response.content)
            except Unavailable as error:
                if "ready" not in error.details:  # a proxy's 503, or that of a server with too many connections
                    raise
                content = dict(error.details)
            return read(Readiness, content)

    async def aclose(self) -> None:
        """Close all connections; calls that are being made end with a RuntimeError."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _open(self, options: PredictOptions) -> Call:
        request_id = options.get("request_id") or uuid.uuid4().hex
        if not (request_id.isascii() and request_id.isprintable()):
            raise InvalidRequest(f"request_id: expected printable ASCII, got {request_id[:80]!r}")
        timeout_s = options.get("timeout_s")
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return Call(Attempts(time.monotonic(), timeout_s, budget_of(options), self._retries), request_id)

    @contextmanager
    def _forgetting(self, model: str) -> Iterator[None]:
        """A model that is not what it was is asked about anew next time."""
        try:
            yield
        except (InvalidRequest, NotServed):
            self._only = None
            self._details = {key: detail for key, detail in self._details.items() if key[0] != model}
            raise

    async def _resolve(self, call: Call, inputs: Inputs, model: str | None, version: int | None) -> tuple[str, list[Row]]:
        """The model's name, and the rows for it."""
        name = await self._name(call, model)
        with self._forgetting(name):
            detail = self._details.get((name, version))
            if detail is None and holds_arrays(inputs):
                detail = await self._describe(call, name, version)
            shape, datatype = (detail.input_shape, detail.input_datatype) if detail else (None, "FP32")
            if takes_long(inputs):  # a file can be a pipe, or on a disk that does not answer: the deadline holds there too
                read_rows = partial(rows_of, inputs, shape, datatype)
                return name, await anyio.to_thread.run_sync(read_rows, abandon_on_cancel=True)
            return name, rows_of(inputs, shape, datatype)

    async def _name(self, call: Call, model: str | None) -> str:
        if model is not None:
            return model
        if self._only is None:
            found = await self._list(call)
            if not found:
                raise NotServed(f"no model is served at {self._http.base_url}")
            if len(found) > 1:
                raise InvalidRequest(f"model: expected one of {', '.join(each.name for each in found)}, got none")
            self._only = found[0].name
        return self._only

    async def _list(self, call: Call) -> tuple[Model, ...]:
        return read_all(Model, await self._sender.ask(call, Request("GET", "/v1/models")), "models")

    async def _describe(self, call: Call, name: str, version: int | None) -> ModelDetail:
        content = await self._sender.ask(call, Request("GET", model_path(name, version)))
        memory = read(Memory, content["memory"]) if content.get("memory") is not None else None
        detail = read(ModelDetail, content, paths=read_all(Path, content, "paths"), memory=memory)
        self._details[name, version] = detail
        return detail

    async def _event(
        self, call: Call, events: AsyncIterator[tuple[str, Any]], final: dict[int, Prediction], rows: int
    ) -> Rung | Answer:
        """The next of a stream; the predictions that are final are put into `final`, by row."""
        with self._sender.reached():
            async for name, content in events:
                if name == "answer":
                    rung = read(Rung, content, prediction=read(Prediction, content))
                    if rung.final:
                        final[rung.row] = rung.prediction
                    return rung
                if name == "error":
                    raise error_in_stream(content)
                if name == "end":
                    return self._answer(call, content, tuple(final[row] for row in sorted(final)), rows)
        raise Unavailable("the stream broke off before its end")

    def _answer(self, call: Call, content: Any, predictions: tuple[Prediction, ...], rows: int) -> Answer:
        return read_answer(
            content,
            predictions,
            rows=rows,
            budget_ms=call.attempts.budget_ms,
            elapsed_ms=round(1000 * (time.monotonic() - call.attempts.started_s), 3),
            requests=call.sent,
            request_id=call.request_id,
        )
