"""What stands between the socket and the app: uvicorn, set up as the settings say, and its connections, bounded.

uvicorn's parser bounds neither a request's headers and trailers nor how long they take, skips the body of who offers
another protocol and takes it for the next request, and answers what it cannot parse in plain text. Nor does uvicorn end
connections whose clients send a body that nobody waits for, or take no answer.
Whether a request is to be refused is noted in its scope where that is possible: `service.access` answers it as all others.
Before there is a scope the answer is made here, and counted and logged by `service.access` as well.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import FrameType
from typing import Any, ClassVar, Literal

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.access import HEADER, id_of, log_request
from service.errors import (
    ClientGone,
    HeadersTooLarge,
    MalformedRequest,
    RequestTimeout,
    ServiceError,
    TooManyConnections,
)
from service.gate import Gate, late
from service.glimpse import glimpsed_budget_ms
from service.metrics import Metrics
from service.settings import Settings

_HEADER = HEADER.lower().encode()

_OFFERS = (b"upgrade", b"http2-settings")  # of another protocol: headers, and tokens of `connection`

_ACCEPTED_AT_ONCE = 16  # connections

_HEARD_OUT_S = 1.0  # at most so long connections are accepted after SIGTERM, where one after another comes


class BadCertificate(Exception):
    """The certificate, its key or the authorities cannot be loaded."""


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """The configuration of the server, loaded.

    Raises:
        BadCertificate: TLS was asked for, and cannot be.
    """
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=bounded_connection(settings, app.state.metrics, app.state.gate),
        ws="none",
        workers=1,
        access_log=False,  # `service.access` writes it
        log_config=None,  # `service.logs`
        timeout_graceful_shutdown=settings.drain_s,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        ssl_keyfile_password=settings.key_password,
        ssl_ca_certs=settings.tls_client_ca,
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_client_ca else ssl.CERT_NONE,
    )
    try:
        _check_password(settings)
        config.load()
    except OSError as exc:  # ssl.SSLError is one
        raise BadCertificate(
            f"the TLS certificate {settings.tls_cert} cannot be used: expected PEM files of a chain and its key, and the "
            f"key's password if it has one: {exc}"
        ) from exc
    return config


def _check_password(settings: Settings) -> None:
    """Refuse an encrypted key without its password: OpenSSL would ask for it on the terminal, and wait."""
    file = settings.tls_key or settings.tls_cert
    if file is not None and settings.key_password is None and b"ENCRYPTED" in file.read_bytes():
        raise BadCertificate(f"the TLS key {file} is encrypted: expected its password by tls_key_password or its file")


class Server(uvicorn.Server):
    """uvicorn's server; `on_exit` is called by the signal that tells it to stop, and then `drain` begins at once, for
    whatever serves beside HTTP."""

    def __init__(
        self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]], on_exit: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See signal.signal. uvicorn takes notice of a signal only a tenth of a second later."""
        self._on_exit()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. In each of its turns uvloop accepts one connection of a socket (libuv since 1.45), so that in an
        overload, when turns are long, who connected waited for seconds: hence each socket several times."""
        await super().startup(sockets)
        loop, config = asyncio.get_running_loop(), self.config
        if not self.started or not type(loop).__module__.startswith("uvloop"):
            return
        made: Any = config.http_protocol_class
        protocol = partial(made, config=config, server_state=self.server_state, app_state=self.lifespan.state)
        for listening in [each for server in self.servers for each in server.sockets]:
            for _ in range(_ACCEPTED_AT_ONCE - 1):
                copy = listening.dup()
                self.servers.append(await loop.create_server(protocol, sock=copy, ssl=config.ssl, backlog=config.backlog))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and end when all that is open has, or has had its time."""
        await asyncio.gather(self._drain(), self._shutdown_http(sockets))

    async def _shutdown_http(self, sockets: list[socket.socket] | None) -> None:
        """uvicorn's shutdown, once who came before it is accepted and read: it would reset their connections."""
        until_s = time.monotonic() + _HEARD_OUT_S
        known: set[object] | None = None
        while known is None or (self.server_state.connections - known and time.monotonic() < until_s):
            known = set(self.server_state.connections)
            for _ in range(4):  # turns of the loop: to accept, to tell the protocol, to read
                await asyncio.sleep(0)
        await super().shutdown(sockets)


def bounded_connection(settings: Settings, counted: Metrics, passed: Gate) -> type[BoundedConnection]:
    """The class of connections with these limits, whose refusals are `counted`: uvicorn makes the instances. Their requests
    wait at the gate that is `passed`."""

    class Connection(BoundedConnection):
        max_header_bytes = settings.max_header_bytes
        max_connections = settings.max_connections
        header_timeout_s = settings.header_timeout_s
        body_timeout_s = settings.body_timeout_s
        metrics = counted
        log = settings.access_log
        gate = passed

    return Connection


class BoundedConnection(HttpToolsProtocol):
    """A connection of uvicorn whose requests' URL, headers and trailers are bounded, in length and in time, and so is the
    number of connections. It stays HTTP/1.1, whatever is offered. What is refused by the parser gets the error shape, too.
    """

    max_header_bytes: ClassVar[int]
    max_connections: ClassVar[int]
    header_timeout_s: ClassVar[float]
    body_timeout_s: ClassVar[float]
    metrics: ClassVar[Metrics]
    log: ClassVar[bool]
    gate: ClassVar[Gate]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol. Who connects and sends nothing has as long as for headers."""
        super().connection_made(transport)
        self._one_more = len(self.connections) > self.max_connections  # than may be, unless some have gone when it asks
        self._in_head = True
        self._unparsed_bytes = 0  # since the last request
        self._beside_bytes = 0  # since its headers, or the latest of its body
        self._declined = False  # whether what is parsed is to be read again
        self._began_s = 0.0  # when the first of them came
        self._begun: RequestResponseCycle | None = None  # the request that the app has, and since when
        self._begun_s = 0.0
        self._free_s = 0.0  # since when its client has the latest answer, and may ask again
        self._late, self._unsent, self._untaken = _Alarm(), _Alarm(), _Alarm()  # headers, a body nobody reads, an answer
        self._late.set(self.loop, self.header_timeout_s, self._on_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        for alarm in (self._late, self._unsent, self._untaken):
            alarm.unset()
        if self._begun is not None:  # uvicorn knows the latest alone, of those that came one after the other
            self._begun.disconnected = True
            self._begun.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. At most one read, 256 KB, is parsed beyond the limit."""
        if not self._unparsed_bytes:
            self._began_s = time.monotonic()
        self._unparsed_bytes += len(data)
        self._beside_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(memoryview(data))
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        if self.transport.is_closing():
            return
        if not self._in_head:
            if self._beside_bytes > self.max_header_bytes:
                self._end_body()
        elif self._unparsed_bytes > self.max_header_bytes:
            self._refuse(HeadersTooLarge(self._too_large))
        elif self._unparsed_bytes:
            self._late.set(self.loop, self.header_timeout_s, self._on_late)

    def _parse(self, data: memoryview) -> None:
        """Other protocols are declined, by reading a request again without the offer: httptools would skip its body. (RFC
        9110, 7.8: a server may ignore an offer; Java's client makes one with every request.)"""
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as exc:
                if not self._declined:  # CONNECT, whose every word is another protocol
                    self._refuse(MalformedRequest("expected another method than CONNECT: this is no proxy"))
                    return
                data = data[exc.args[0] :]
                head = self._head_without_offer()
                self._declined = False
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                self.parser.feed_data(head)
            else:
                return

    def _head_without_offer(self) -> bytes:
        head = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(token for token in value.split(b",") if token.strip().lower() not in _OFFERS)
            if name not in _OFFERS:
                head.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*head, b"", b""])

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser's. Trailers are nobody's wishes: what checks headers has been passed by then."""
        if self._in_head:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """The parser's."""
        self._beside_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """The parser's: the app is called from here."""
        if self.parser.should_upgrade():
            self._declined = self.parser.get_method() != b"CONNECT"
            return
        self._in_head = False
        self._beside_bytes = 0
        self._late.unset()
        self.scope["state"]["arrived_s"] = max(self.gate.came_s(time.monotonic()), self._free_s)
        refused: ServiceError | None = None
        if self._unparsed_bytes > self.max_header_bytes:  # with what came of the body
            length = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            refused = HeadersTooLarge(self._too_large) if length > self.max_header_bytes else None
        self._one_more = self._one_more and len(self.connections) > self.max_connections
        if self._one_more:
            refused = TooManyConnections(f"expected at most {self.max_connections} connections: ask again in a second")
        if refused is not None:
            self.scope["state"]["refused"] = refused
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The parser's: the next request may begin."""
        if self.parser.should_upgrade():
            return
        self._in_head = True
        self._unparsed_bytes = 0
        self._unsent.unset()
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """uvicorn's, for every request whose headers are there. Probes, scrapes and pages do not wait behind a crowd."""
        if cycle.scope["method"] == "POST" and "refused" not in cycle.scope["state"]:
            self.gate.enter(_Unread(self, cycle, app))
        else:
            self.begin(cycle, app)

    def begin(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Hand a request to the app."""
        self._begun, self._begun_s = cycle, time.monotonic()
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """uvicorn's: the next request of the connection may begin."""
        self._free_s = now_s = time.monotonic()
        if self._begun is not None:
            state = self._begun.scope["state"]  # see `service.access.HttpArrival`
            if (budget_ms := state.get("budget_ms")) is not None:
                self.gate.pace.ended(budget_ms / 1000, self._begun_s, state["answer"], now_s)
            self._begun = None
        if not self._in_head and self.cycle.response_complete:
            self._unsent.set(self.loop, self.body_timeout_s, self.transport.abort)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._untaken.set(self.loop, self.body_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        self._untaken.unset()

    def _end_body(self) -> None:
        """Of a body that is all trailers and extensions of chunks."""
        if self.cycle.response_started:
            self.transport.abort()
        else:
            most = f"{self.max_header_bytes} bytes"
            self._refuse(HeadersTooLarge(f"expected trailers and chunk extensions of at most {most}, got more"))

    def refuse_unread(self, cycle: RequestResponseCycle, error: ServiceError) -> None:
        """Answer a whole request without the app. The connection stays, if its client keeps it."""
        self._tell(error, _known_of(cycle), cycle.scope["method"], close=not cycle.keep_alive)
        cycle.response_started = cycle.response_complete = True
        self.on_response_complete()
        _let_go(cycle)

    def forget(self, cycle: RequestResponseCycle) -> None:
        """A client left before the app heard of its request."""
        self._note(ClientGone("the client closed the connection"), _known_of(cycle), cycle.scope["method"], 0)
        _let_go(cycle)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, for what is no HTTP."""
        self._refuse(MalformedRequest(f"expected a request in HTTP/1.1: {msg}"))

    @property
    def _too_large(self) -> str:
        return f"expected a URL and headers of at most {self.max_header_bytes} bytes together, got more"

    def _on_late(self) -> None:
        if self._unparsed_bytes:
            self._refuse(RequestTimeout(f"expected the headers of a request within {self.header_timeout_s:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: ServiceError) -> None:
        """Answer what is no request yet, and close. A client's own id may not have been read, so it gets one."""
        state = {"request_id": id_of(None), "arrived_s": self._began_s, "bytes_in": self._unparsed_bytes}
        self._tell(error, state, None, close=True)

    def _tell(self, error: ServiceError, state: dict[str, Any], method: str | None, *, close: bool) -> None:
        """Write an error as the response, count and log it."""
        body = json.dumps({"error": str(error), "code": error.code}).encode()
        head = f"content-type: application/json\r\n{HEADER.lower()}: {state['request_id']}\r\n"
        head += "connection: close\r\n" if close else ""
        self.transport.write(STATUS_LINE[error.status] + f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        if close:
            self.transport.close()
        self._note(error, state, method, len(body))

    def _note(self, error: ServiceError, state: dict[str, Any], method: str | None, bytes_out: int) -> None:
        self.metrics.refusals.labels(error.code).inc()
        if self.log:
            log_request(state | {"status": error.status, "bytes_out": bytes_out}, method, None)


class _Unread:
    """A request of a connection, for the gate."""

    __slots__ = ("_app", "_budget_s", "_connection", "_cycle")

    def __init__(self, connection: BoundedConnection, cycle: RequestResponseCycle, app: Any) -> None:
        self._connection, self._cycle, self._app = connection, cycle, app
        self._budget_s: float | Literal["unseen"] | None = "unseen"

    @property
    def gone(self) -> bool:
        """See `Unread`."""
        return self._cycle.disconnected or self._connection.transport.is_closing()

    @property
    def arrived_s(self) -> float:
        """See `Unread`."""
        arrived_s: float = self._cycle.scope["state"]["arrived_s"]
        return arrived_s

    def budget_s(self) -> float | None:
        """See `Unread`. While the body is still to come it is the app's matter how long that takes."""
        scope = self._cycle.scope
        if self._cycle.more_body:
            return None
        if self._budget_s == "unseen":
            budget_ms = glimpsed_budget_ms(scope["path"], scope["query_string"], scope["headers"], self._cycle.body)
            self._budget_s = None if budget_ms is None else budget_ms / 1000
        return self._budget_s

    def begin(self) -> None:
        """See `Unread`."""
        self._connection.begin(self._cycle, self._app)

    def refuse(self) -> None:
        """See `Unread`."""
        self._connection.refuse_unread(self._cycle, late(self.arrived_s))

    def forget(self) -> None:
        """See `Unread`."""
        self._connection.forget(self._cycle)


class _Alarm:
    """A timer that can be set, which changes nothing if it is, and unset: then it holds on to nothing."""

    __slots__ = ("_handle",)

    def __init__(self) -> None:
        self._handle: asyncio.TimerHandle | None = None

    def set(self, loop: asyncio.AbstractEventLoop, after_s: float, action: Callable[[], None]) -> None:
        if self._handle is None:
            self._handle = loop.call_later(after_s, self._go_off, action)

    def unset(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _go_off(self, action: Callable[[], None]) -> None:
        self._handle = None
        action()


def _let_go(cycle: RequestResponseCycle) -> None:
    """Of the body, and of the connection, which has the request: uvicorn does so where the app was called. Else only the
    garbage collector would find them."""
    cycle.body = bytearray()
    cycle.on_response = lambda: None


def _known_of(cycle: RequestResponseCycle) -> dict[str, Any]:
    """What the access log tells of a request that no app has seen."""
    given = next((value for name, value in cycle.scope["headers"] if name == _HEADER), None)
    return cycle.scope["state"] | {"request_id": id_of(given), "bytes_in": len(cycle.body)}
