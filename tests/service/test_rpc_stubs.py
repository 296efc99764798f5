"""The stubs are what the proto gives, and the proto is a part of the published interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from service.oip.rpc.generate import STUBS, generate
from service.oip.rpc.stubs import open_inference_pb2 as pb

SERVICE = "GRPCInferenceService"


def test_the_stubs_are_what_the_proto_gives(tmp_path: Path) -> None:
    generate(tmp_path)
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_text() for file in STUBS.glob("*_pb2.py*")}
    assert len(written) == 2


def messages(container: Any) -> Iterator[Any]:
    for message in container.values():
        yield message
        yield from messages(message.nested_types_by_name)


def kind(field: Any) -> tuple[object, ...]:
    """All that matters on the wire, and the names of types."""
    inner = field.message_type or field.enum_type
    one_of = field.containing_oneof and field.containing_oneof.name
    return field.number, field.type, field.is_repeated, inner and inner.full_name, one_of


PUBLISHED = {
    message.full_name: message
    for module in (service_pb2, model_config_pb2)
    for message in messages(module.DESCRIPTOR.message_types_by_name)
}


@pytest.mark.parametrize("message", list(messages(pb.DESCRIPTOR.message_types_by_name)), ids=lambda message: message.name)
def test_every_field_is_the_published_one(message: Any) -> None:
    published = PUBLISHED[message.full_name].fields_by_name
    assert {field.name: kind(field) for field in message.fields} == {
        field.name: kind(published[field.name]) for field in message.fields
    }


def test_every_method_is_the_published_one() -> None:
    published = service_pb2.DESCRIPTOR.services_by_name[SERVICE].methods_by_name
    for name, method in pb.DESCRIPTOR.services_by_name[SERVICE].methods_by_name.items():
        theirs = published[name]
        assert method.full_name == theirs.full_name
        assert method.input_type.full_name == theirs.input_type.full_name
        assert method.output_type.full_name == theirs.output_type.full_name
        assert (method.client_streaming, method.server_streaming) == (theirs.client_streaming, theirs.server_streaming)


def test_every_datatype_is_the_published_one() -> None:
    assert dict(pb.DataType.items()) == dict(model_config_pb2.DataType.items())
