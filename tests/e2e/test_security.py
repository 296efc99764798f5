"""What protects a real server: TLS, keys and their rates, and bounds on what a connection may send and how slowly."""

from __future__ import annotations

import json
import re
import select
import socket
import ssl
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme

from service.keyring import add_key, remove_key
from tests.conftest import LiveServer, Trained, start_server, wait_for

IMAGE = [[0.5] * 28] * 28
PREDICT = "/v1/models/digits/predict"


@dataclass(frozen=True)
class Guarded:
    """A server that speaks TLS and knows keys."""

    live: LiveServer
    trust: ssl.SSLContext
    keys: Path
    tokens: dict[str, str]

    def client(self, key: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.tokens[key]}"}
        return httpx.Client(base_url=self.live.url, verify=self.trust, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def guarded(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    keys = folder / "keys.toml"
    tokens = {
        "few": add_key(keys, "few", rate="5/hour", admin=False),
        "many": add_key(keys, "many", rate="1000/second", admin=False),
    }
    config = folder / "hbll.toml"
    config.write_text(
        f"keys_file = '{keys}'\ntls_cert = '{folder / 'server.pem'}'\naccess_log = true\nlog_format = 'json'\n"
    )
    with start_server(trained.models, folder, {"HBLL_CONFIG": str(config)}, trust=trust) as live:
        yield Guarded(live, trust, keys, tokens)


def test_one_key_is_exhausted_and_the_other_unaffected(guarded: Guarded) -> None:
    with guarded.client("few") as few, guarded.client("many") as many:
        answers = []
        for _ in range(8):
            answers.append(few.post(PREDICT, json={"inputs": [IMAGE]}))
            assert many.post(PREDICT, json={"inputs": [IMAGE]}).status_code == 200
        assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 3
        assert {answer.json()["code"] for answer in answers[5:]} == {"rate_limited"}
        assert all(int(answer.headers["retry-after"]) > 3000 for answer in answers[5:])


def test_keys_are_made_and_removed_while_it_serves(guarded: Guarded) -> None:
    token = add_key(guarded.keys, "late", rate=None, admin=False)
    with httpx.Client(base_url=guarded.live.url, verify=guarded.trust, headers={"x-api-key": token}) as client:

        def becomes(status: int) -> bool:
            # Each question takes a moment, and the file is looked at every second.
            return any(client.get("/v1/models").status_code == status for _ in range(20_000))

        assert becomes(200)
        remove_key(guarded.keys, "late")
        assert becomes(401)


def test_who_does_not_trust_the_certificate_gets_no_answer(guarded: Guarded) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{guarded.live.url}/health/live", verify=ssl.create_default_context())
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{guarded.live.url}/health/live".replace("https", "http"))


def log_with(live: LiveServer, text: str) -> str:
    """The log, once it has this: a request's line is written when its answer has been sent."""
    wait_for(lambda: text in live.log.read_text())
    return live.log.read_text()


def test_both_logs_are_json_and_know_no_secret(guarded: Guarded) -> None:
    with guarded.client("many") as client:
        body = {"inputs": [IMAGE], "depth": 2}
        client.post(f"{PREDICT}?secret=yes", json=body, headers={"x-request-id": "this-one"})
    text = log_with(guarded.live, "this-one")
    lines = [json.loads(line) for line in text.splitlines()]
    (line,) = (line for line in lines if line.get("request_id") == "this-one")
    assert line.pop("time").endswith("+00:00")
    assert line.pop("duration_ms") > 0
    assert line.pop("bytes_out") > 100
    assert line == {
        "request_id": "this-one",
        "method": "POST",
        "route": "/v1/models/{model}/predict",
        "status": 200,
        "model": "digits",
        "depth": 2,
        "stopped_by": "depth",
        "deadline_met": None,
        "key": "many",
        "bytes_in": len(json.dumps(body, separators=(",", ":"))),
    }
    assert any(line.get("message") == "ready: serving digits 1" and line["level"] == "INFO" for line in lines)
    assert "secret" not in text
    assert not any(token in text for token in guarded.tokens.values())


BOUNDS = {
    "HBLL_MAX_HEADER_BYTES": "4096",
    "HBLL_HEADER_TIMEOUT_S": "1",
    "HBLL_BODY_TIMEOUT_S": "1",
    "HBLL_MAX_CONNECTIONS": "3",
    "HBLL_ACCESS_LOG": "true",
}


@pytest.fixture(scope="module")
def bounded(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with start_server(trained.models, tmp_path_factory.mktemp("bounded"), BOUNDS) as live:
        yield live


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    content: dict[str, object]


def talk(server: LiveServer, *parts: bytes) -> Answer:
    """Send `parts` over a connection of its own, and read until the server closes it."""
    with connect(server) as connection:
        for part in parts:
            connection.sendall(part)
        return read(connection)


def connect(server: LiveServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), timeout=30)


def read(connection: socket.socket) -> Answer:
    raw = b""
    while piece := connection.recv(65536):
        raw += piece
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return Answer(int(status.split()[1]), headers, json.loads(body))


HEAD = b"POST /v1/models/digits/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        (HEAD + b"X-Long: " + b"x" * 5000 + b"\r\n\r\n",),
        (HEAD + b"X-Long: " + b"x" * 5000,),
        (HEAD + b"X: y\r\n" * 1000,),
        (b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n",),
    ],
    ids=["one long header", "one without an end", "many headers", "a long URL"],
)
def test_headers_and_url_are_bounded(bounded: LiveServer, parts: tuple[bytes, ...]) -> None:
    answer = talk(bounded, *parts)
    assert (answer.status, answer.content["code"]) == (431, "headers_too_large")
    assert answer.content["error"] == "expected a URL and headers of at most 4096 bytes together, got more"
    assert answer.headers["connection"] == "close"


def test_a_long_body_is_no_long_header(bounded: LiveServer) -> None:
    """Also if it comes together with the headers."""
    body = json.dumps({"inputs": [IMAGE]}).encode() + b" " * 50_000
    answer = talk(bounded, HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert answer.status == 200


def test_headers_may_fill_what_is_allowed_request_after_request(bounded: LiveServer) -> None:
    with httpx.Client(base_url=bounded.url, headers={"x-long": "x" * 3000}) as client:
        assert [client.get("/health/live").status_code for _ in range(5)] == [200] * 5


def test_a_body_that_trickles_is_given_up(bounded: LiveServer) -> None:
    answer = talk(bounded, HEAD + b"Content-Length: 100000\r\n\r\n{", b"  ")
    assert (answer.status, answer.content["code"]) == (408, "request_timeout")
    assert answer.content["error"] == "expected the whole body within 1 s, got 3 bytes"
    assert answer.headers["connection"] == "close"
    assert len(answer.headers["x-request-id"]) == 32


def test_headers_that_trickle_are_given_up(bounded: LiveServer) -> None:
    answer = talk(bounded, HEAD)
    assert (answer.status, answer.content["code"]) == (408, "request_timeout")
    assert answer.content["error"] == "expected the headers of a request within 1 s"


def test_who_says_nothing_is_hung_up_on(bounded: LiveServer) -> None:
    with connect(bounded) as connection:
        assert connection.recv(1) == b""


def test_more_connections_than_allowed_are_refused_and_others_served(bounded: LiveServer) -> None:
    with (
        httpx.Client(base_url=bounded.url) as one,
        httpx.Client(base_url=bounded.url) as two,
        httpx.Client(base_url=bounded.url) as three,
        httpx.Client(base_url=bounded.url) as four,
    ):
        for client in (one, two, three):
            assert client.get("/health/live").status_code == 200
        refused = four.get("/health/live")
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_connections")
        assert refused.headers["retry-after"] == "1"
        assert "x-request-id" in refused.headers
        assert one.post(PREDICT, json={"inputs": [IMAGE]}).status_code == 200
        with connect(bounded):  # and says nothing
            assert two.post(PREDICT, json={"inputs": [IMAGE]}).status_code == 200, "it was here before"
        one.close()
        assert any(httpx.get(f"{bounded.url}/health/live").status_code == 200 for _ in range(1000))


def responses(server: LiveServer, *parts: bytes) -> list[bytes]:
    """The statuses of what comes back for `parts`, sent one after the other over one connection, until it is closed."""
    raw = b""
    with connect(server) as connection, suppress(ConnectionError):  # it may be closed while parts are still to come
        for part in parts:
            connection.sendall(part)
            while select.select([connection], [], [], 0.05)[0] and (piece := connection.recv(65536)):
                raw += piece  # at once: a reset would take it away
        while piece := connection.recv(65536):
            raw += piece
    return re.findall(rb"HTTP/1\.1 (\d+)", raw)


def send_on(connection: socket.socket, data: bytes, pause_s: float = 0.0) -> None:
    until_s = time.monotonic() + 30
    while time.monotonic() < until_s:
        connection.sendall(data)
        time.sleep(pause_s)


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"
LAST = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def test_who_offers_another_protocol_is_answered_in_this_one(bounded: LiveServer) -> None:
    """As Java's client does with every request. Bug found: the body was skipped, or taken for the next request."""
    body = json.dumps({"inputs": [IMAGE]}).encode()
    whole = HEAD + UPGRADE + b"Content-Length: %d\r\n\r\n" % len(body)
    assert responses(bounded, whole + body + LAST) == [b"200", b"200"]
    assert responses(bounded, whole[:-20], whole[-20:], body[:9], body[9:] + LAST) == [b"200", b"200"]
    assert responses(bounded, LAST.replace(b"Connection: close\r\n", UPGRADE) * 3 + LAST) == [b"200"] * 4
    within = b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n"
    hidden = HEAD.replace(b"v1/models/digits/predict", b"health/live") + UPGRADE + b"Content-Length: %d\r\n\r\n"
    assert responses(bounded, hidden % len(within), within, LAST) == [b"405", b"200"]


@pytest.mark.parametrize("target", [b"/health/live", b"example.com:443"])
def test_connect_is_refused(bounded: LiveServer, target: bytes) -> None:
    assert responses(bounded, b"CONNECT " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n" + LAST) == [b"400"]
    assert "Traceback" not in bounded.log.read_text()


def test_trailers_are_no_headers(bounded: LiveServer) -> None:
    body = json.dumps({"inputs": [IMAGE]}).encode()
    chunks = b"%x\r\n%s\r\n0\r\n" % (len(body), body)
    answer = talk(bounded, CHUNKED + b"Connection: close\r\n\r\n" + chunks + b"X-Depth: 1\r\n\r\n")
    assert answer.content["predictions"][0]["depth"] > 1  # type: ignore[index]


@pytest.mark.parametrize(
    "parts",
    [
        (CHUNKED + b"\r\n0\r\n", *[b"a: b\r\n" * 100] * 12),
        (CHUNKED + b"\r\n0\r\na: ", *[b"x" * 600] * 12),
        (CHUNKED + b"\r\n1;", *[b"x" * 600] * 12),
    ],
    ids=["many", "one long one", "an extension of a chunk"],
)
def test_what_stands_beside_a_body_is_bounded(bounded: LiveServer, parts: tuple[bytes, ...]) -> None:
    """Bug found: 60 MB of trailers took a gigabyte, and no key was needed for it."""
    assert responses(bounded, *parts) == [b"431"]


def test_what_is_sent_after_its_answer_has_an_end(bounded: LiveServer) -> None:
    """Bug found: whoever sent a byte now and then kept a connection for ever."""
    with connect(bounded) as connection:
        connection.sendall(HEAD.replace(b"v1/models/digits/predict", b"nowhere") + b"Content-Length: 1000000\r\n\r\n")
        assert b" 404 " in connection.recv(65536)
        with pytest.raises(ConnectionError):
            send_on(connection, b"x", 0.1)


def test_who_takes_no_answer_is_hung_up_on(bounded: LiveServer) -> None:
    with connect(bounded) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(ConnectionError):
            send_on(connection, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")


@pytest.mark.parametrize(
    "garbage", [b"hello\r\n\r\n", b"\x16\x03\x01\x00\xa5\x01", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"]
)
def test_what_is_no_http_gets_the_error_shape_too(bounded: LiveServer, garbage: bytes) -> None:
    answer = talk(bounded, garbage)
    assert (answer.status, answer.content["code"]) == (400, "malformed_request")
    assert answer.headers["content-type"] == "application/json"
    assert httpx.get(f"{bounded.url}/health/live").status_code == 200


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"hello\r\n\r\n", 400, "malformed_request"),
        (HEAD + b"X-Long: " + b"x" * 5000, 431, "headers_too_large"),
        (HEAD, 408, "request_timeout"),
    ],
)
def test_what_is_refused_before_it_is_whole_is_counted_and_logged(
    bounded: LiveServer, sent: bytes, status: int, code: str
) -> None:
    def count() -> float:
        text = httpx.get(f"{bounded.url}/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in text if line.startswith(f'hbll_refusals_total{{code="{code}"}}'))

    before = count()
    own = talk(bounded, sent).headers["x-request-id"]
    assert count() == before + 1
    (line,) = (json.loads(line) for line in log_with(bounded, own).splitlines() if own in line)
    assert (line["status"], line["route"], line["method"], line["bytes_in"]) == (status, None, None, len(sent))
    assert 0 <= line["duration_ms"] < 60_000


def test_a_certificate_that_cannot_be_used_stops_start_up(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    with pytest.raises(AssertionError, match=r"Error: the TLS certificate .*cert\.pem cannot be used: expected PEM files"):
        start_server(trained.models, tmp_path, {"HBLL_TLS_CERT": str(tmp_path / "cert.pem")})


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/v1/models/digits/predict", "application/json"),
        ("/v1/models/digits/predict", "application/octet-stream"),
        ("/v2/models/digits/infer", "application/json"),
        ("/v2/repository/index", "application/json"),
    ],
)
def test_who_leaves_before_the_request_is_whole_is_no_error_of_the_server(
    bounded: LiveServer, path: str, content_type: str
) -> None:
    own = uuid.uuid4().hex
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nX-Request-Id: {own}\r\n"
    with connect(bounded) as connection:
        connection.sendall(f"{head}Content-Length: 3136\r\n\r\nhalf".encode())
        time.sleep(0.1)
    (line,) = (json.loads(line) for line in log_with(bounded, own).splitlines() if own in line)
    assert line["status"] == 499
    assert "Traceback" not in bounded.log.read_text()
