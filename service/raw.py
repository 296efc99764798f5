"""Raw bodies, for those who count microseconds: one little-endian row-major tensor, wishes in the query."""

from __future__ import annotations

import math

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from family.manifest import Manifest
from service.access import HttpArrival
from service.call import open_call
from service.context import context_of
from service.direct import DirectRoute
from service.errors import InvalidInput
from service.inputs import check_rows
from service.media import OCTETS
from service.predict import answer_call
from service.runtime import Rows
from service.versions import model_urls, served_model
from service.wishes import with_headers, with_query


async def predict_raw(request: Request) -> Response:
    """As `service.predict.predict`, for a raw body."""
    ctx = context_of(request)
    served = served_model(request)
    wishes = with_headers(with_query(request.scope["query_string"]), request.scope["headers"])
    body = await request.body()
    x = _read(body, served.manifest, ctx.settings.max_request_rows)
    call = open_call(ctx, served, wishes, len(x), HttpArrival(request))
    return await answer_call(request, call, x, probabilities=wishes.probabilities)


direct_routes = [DirectRoute(f"{url}/predict", predict_raw, OCTETS) for url in model_urls("/v1")]
"""At the URLs of JSON bodies."""


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
