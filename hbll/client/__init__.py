"""The Python client of a server: `Client`, and `AsyncClient` for asynchronous code. Needs httpx, anyio and numpy.

with Client("http://127.0.0.1:8000") as client:
    answer = client.predict("digit.png", latency_budget_ms=20)
    print(answer.predictions[0].label, answer.deadline_met)
"""

from hbll.client.aio import DEFAULT_URL, AsyncClient
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
    Risk,
    Rung,
)
from hbll.client.errors import (
    DeadlineExceeded,
    HbllError,
    InvalidRequest,
    NotServed,
    Refused,
    ServerFailed,
    Unauthorized,
    Unavailable,
    UnexpectedAnswer,
)
from hbll.client.inputs import Inputs
from hbll.client.requests import PredictOptions, StreamOptions, Wishes
from hbll.client.sync import Client

__all__ = [
    "AsyncClient",
    "Client",
    "DEFAULT_URL",
    "Inputs",
    "Wishes",
    "PredictOptions",
    "StreamOptions",
    "Answer",
    "Prediction",
    "Risk",
    "Rung",
    "Model",
    "ModelDetail",
    "Memory",
    "Path",
    "Plan",
    "PlannedAnswer",
    "Readiness",
    "HbllError",
    "InvalidRequest",
    "Unauthorized",
    "NotServed",
    "Refused",
    "DeadlineExceeded",
    "Unavailable",
    "ServerFailed",
    "UnexpectedAnswer",
]
