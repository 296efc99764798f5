"""Raw bodies, for those who count microseconds: one little-endian row-major tensor, wishes in the query."""

from __future__ import annotations

import math

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from family.manifest import Manifest
from service.call import open_call
from service.context import context_of
from service.errors import InvalidInput
from service.inputs import check_rows
from service.media import OCTETS
from service.predict import answer_call
from service.runtime import Rows
from service.versions import served_model
from service.wishes import with_headers, with_query


async def predict_raw(request: Request) -> Response:
    """As `service.predict.predict`, for a raw body. It does without FastAPI's dependencies, which take as long as all
    else together."""
    ctx = context_of(request)
    served = served_model(request)
    wishes = with_headers(with_query(request.scope["query_string"]), request.scope["headers"])
    body = await request.body()
    x = _read(body, served.manifest, ctx.settings.max_request_rows)
    call = open_call(ctx, served, wishes, len(x), request.state.arrived_s)
    return await answer_call(request, ctx, call, x, probabilities=wishes.probabilities)


class RawRoute(Route):
    """Takes raw bodies to the URL of JSON bodies; requests with other content types are left to the routes after it."""

    def __init__(self, model_url: str) -> None:
        super().__init__(f"{model_url}/predict", predict_raw, methods=["POST"], include_in_schema=False)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """See Starlette."""
        for name, value in scope.get("headers", ()):
            if name == b"content-type" and value.partition(b";")[0].strip().lower() == OCTETS.encode():
                match, child_scope = super().matches(scope)
                return match, {**child_scope, "route": self}  # as FastAPI's routes do, for traces
        return Match.NONE, {}


def _read(body: bytes, manifest: Manifest, max_rows: int) -> Rows:
    """The rows `(rows, *input_shape)` of a body.

    Raises:
        InvalidInput: it is not a whole number of rows, or has too many; NaN or infinity, pixels out of range.
    """
    shape, dtype = manifest.input.shape[1:], np.dtype(manifest.input.code)
    row_bytes = dtype.itemsize * math.prod(shape)
    rows, rest = divmod(len(body), row_bytes)
    if rest or not 0 < rows <= max_rows:
        wanted = f"{row_bytes} bytes, {manifest.input.datatype} of shape {list(shape)}"
        raise InvalidInput(f"expected 1 to {max_rows} rows of {wanted}, got {len(body)} bytes")
    x: Rows = np.frombuffer(body, dtype).reshape(rows, *shape)
    check_rows(x, "the body", manifest)
    return x
