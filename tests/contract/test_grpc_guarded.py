"""Who may call by gRPC: API keys and their rates, TLS and clients' certificates, all of them HTTP's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc as triton
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from service.app import create_app
from service.keyring import add_key
from service.oip.rpc.port import GrpcError
from service.settings import Settings
from tests.conftest import Trained
from tests.contract.conftest import Client

Metadata = list[tuple[str, str]]


def request() -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="digits", raw_input_contents=[bytes(3136)])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 28, 28])
    return message


@dataclass(frozen=True)
class Guarded:
    """A server with keys and TLS."""

    address: str
    trust: grpc.ChannelCredentials
    tokens: dict[str, str]

    def stub(self, channel: grpc.Channel) -> service_pb2_grpc.GRPCInferenceServiceStub:
        return service_pb2_grpc.GRPCInferenceServiceStub(channel)

    def key(self, name: str) -> Metadata:
        return [("authorization", f"Bearer {self.tokens[name]}")]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def guarded(trained: Trained, authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    keys = folder / "keys.toml"
    tokens = {
        "alice": add_key(keys, "alice", rate=None, admin=False),
        "few": add_key(keys, "few", rate="2/hour", admin=False),
        "streaming": add_key(keys, "streaming", rate="3/hour", admin=False),
        "operator": add_key(keys, "operator", rate=None, admin=True),
    }
    settings = Settings(models=trained.models, grpc_port=0, keys_file=keys, tls_cert=folder / "server.pem")
    with Client(create_app(settings)) as client:
        yield Guarded(client.rpc, grpc.ssl_channel_credentials(authority.cert_pem.bytes()), tokens)


@pytest.fixture(scope="module")
def channel(guarded: Guarded) -> Iterator[grpc.Channel]:
    with grpc.secure_channel(guarded.address, guarded.trust) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(guarded: Guarded, channel: grpc.Channel) -> service_pb2_grpc.GRPCInferenceServiceStub:
    return guarded.stub(channel)


def refused(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()  # type: ignore[operator]
    return caught.value.code(), dict(caught.value.trailing_metadata()).get("code", "")


CALLS = {
    method.name: getattr(pb, method.input_type.name)
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    if not method.client_streaming and "SharedMemory" not in method.name and "Setting" not in method.name
}


@pytest.mark.parametrize("method", CALLS)
def test_every_call_but_those_for_health_needs_a_key(stub: service_pb2_grpc.GRPCInferenceServiceStub, method: str) -> None:
    def call(metadata: Metadata) -> object:
        return getattr(stub, method)(CALLS[method](), metadata=metadata)

    if method in ("ServerLive", "ServerReady"):
        assert call([]) is not None
        return
    unauthorized = (grpc.StatusCode.UNAUTHENTICATED, "unauthorized")
    assert refused(lambda: call([])) == unauthorized
    assert refused(lambda: call([("authorization", "Bearer wrong")])) == unauthorized


def test_streams_need_a_key_and_health_needs_none(
    channel: grpc.Channel, stub: service_pb2_grpc.GRPCInferenceServiceStub
) -> None:
    assert refused(lambda: list(stub.ModelStreamInfer(iter([request()])))) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "unauthorized",
    )
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_a_key_opens_what_it_may_as_either_metadata(
    guarded: Guarded, stub: service_pb2_grpc.GRPCInferenceServiceStub
) -> None:
    assert stub.ModelInfer(request(), metadata=guarded.key("alice")).model_name == "digits"
    assert stub.ModelInfer(request(), metadata=[("x-api-key", guarded.tokens["alice"])]).model_name == "digits"
    load = pb.RepositoryModelLoadRequest(model_name="digits")
    assert refused(lambda: stub.RepositoryModelLoad(load, metadata=guarded.key("alice"))) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "forbidden",
    )
    assert stub.RepositoryModelLoad(load, metadata=guarded.key("operator")) == pb.RepositoryModelLoadResponse()


def test_a_key_has_its_rate_alone_and_on_a_stream(
    guarded: Guarded, stub: service_pb2_grpc.GRPCInferenceServiceStub
) -> None:
    for _ in range(2):
        stub.ModelInfer(request(), metadata=guarded.key("few"))
    assert refused(lambda: stub.ModelInfer(request(), metadata=guarded.key("few"))) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "rate_limited",
    )
    answers = list(stub.ModelStreamInfer(iter([request()] * 5), metadata=guarded.key("streaming")))
    codes = [answer.infer_response.parameters["code"].string_param for answer in answers]
    assert codes == ["", "", "", "rate_limited", "rate_limited"]


def test_tritonclient_speaks_tls_and_who_does_not_gets_no_answer(
    guarded: Guarded, authority: trustme.CA, tmp_path: Path
) -> None:
    root = tmp_path / "root.pem"
    authority.cert_pem.write_to_path(str(root))
    with triton.InferenceServerClient(guarded.address, ssl=True, root_certificates=str(root)) as client:
        assert client.is_server_ready()
        assert client.is_model_ready("digits", headers=dict(guarded.key("alice")))
    with grpc.insecure_channel(guarded.address) as plain:
        assert refused(lambda: guarded.stub(plain).ServerLive(pb.ServerLiveRequest()))[0] == grpc.StatusCode.UNAVAILABLE


def test_clients_need_a_certificate_where_http_wants_one(trained: Trained, authority: trustme.CA, tmp_path: Path) -> None:
    certificate, root = authority.issue_cert("127.0.0.1"), authority.cert_pem.bytes()
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(key))
    authorities = tmp_path / "authorities.pem"
    authorities.write_bytes(root)
    files = {"tls_cert": chain, "tls_key": key, "tls_client_ca": authorities}
    with Client(create_app(Settings(models=trained.models, grpc_port=0, **files))) as client:
        live = pb.ServerLiveRequest()
        with grpc.secure_channel(client.rpc, grpc.ssl_channel_credentials(root)) as nobody:
            status, _ = refused(lambda: service_pb2_grpc.GRPCInferenceServiceStub(nobody).ServerLive(live, timeout=20))
            assert status == grpc.StatusCode.UNAVAILABLE
        mine = authority.issue_cert("somebody@example.org")
        known = grpc.ssl_channel_credentials(root, mine.private_key_pem.bytes(), mine.cert_chain_pems[0].bytes())
        with grpc.secure_channel(client.rpc, known) as somebody:
            assert service_pb2_grpc.GRPCInferenceServiceStub(somebody).ServerLive(live, timeout=20).live


def test_an_encrypted_key_is_refused_before_anything_is_loaded(authority: trustme.CA, tmp_path: Path) -> None:
    certificate = tmp_path / "server.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(certificate))
    settings = Settings(models=tmp_path, grpc_port=0, tls_cert=certificate, tls_key_password="secret")
    with pytest.raises(GrpcError, match="a private key that is not encrypted"):
        create_app(settings)


def test_who_has_no_key_is_refused_before_there_is_a_message(channel: grpc.Channel) -> None:
    """Bug found: until it came, which can be never, the call took one of those that there may be at a time."""
    silent = threading.Event()

    def nothing() -> Iterator[bytes]:
        silent.wait(60)
        yield from ()

    for method in ("ModelInfer", "ModelStreamInfer", "ServerMetadata"):
        call = channel.stream_unary(f"/inference.GRPCInferenceService/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(nothing(), timeout=60)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    silent.set()
