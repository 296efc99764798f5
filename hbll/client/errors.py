"""What can go wrong with a call, whatever the protocol below says.

    HbllError
    +-- InvalidRequest      400, 405, 413, 415, 422, 431, and what is found before anything is sent: ask otherwise
    +-- Unauthorized        401, 403
    +-- NotServed           404: no such model or version there
    +-- Refused             429: too much is asked of the server now; `retry_after_s`
    +-- DeadlineExceeded    504, a spent budget, or no answer within `timeout_s`; `smallest_feasible_budget_ms`
    +-- Unavailable         408, 502, 503, no connection, or one that broke
    +-- ServerFailed        500 and the rest of 5xx: the server's log has the cause
    +-- UnexpectedAnswer    not what an HBLL server says

Refused and Unavailable are worth another attempt, which the client makes by itself while there is time: whoever catches one
of these has had all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any, ClassVar


class HbllError(Exception):
    """A call without an answer.

    `status` and `code` are the HTTP status and the stable code of the server's answer, none if there was none; `message`
    is its sentence and `details` its further members. `request_id` finds the call in the server's log.
    """

    transient: ClassVar[bool] = False
    """Whether the same request may well succeed a little later."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        details: Mapping[str, Any] = MappingProxyType({}),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message if status is None else f"the server answered {status}: {message}")
        self.message = message
        self.status = status
        self.code = code
        self.details = details
        self.retry_after_s = retry_after_s
        self.request_id: str | None = None


class InvalidRequest(HbllError):
    """The request cannot be answered as it is."""


class Unauthorized(HbllError):
    """The server wants an API key, or another one."""


class NotServed(HbllError):
    """Nothing of that name is served there."""


class Refused(HbllError):
    """The server has too much to do, or this client asked too much of it."""

    transient = True


class DeadlineExceeded(HbllError):
    """No answer within the budget or within `timeout_s`."""

    @property
    def smallest_feasible_budget_ms(self) -> float | None:
        """The smallest budget that the server could have met; only for strict requests."""
        found = self.details.get("smallest_feasible_budget_ms")
        return float(found) if isinstance(found, int | float) else None


class Unavailable(HbllError):
    """The server cannot be reached, is not ready, or went away."""

    transient = True


class ServerFailed(HbllError):
    """The server met an error of its own."""


class UnexpectedAnswer(HbllError):
    """The answer is not one of an HBLL server."""


_BY_STATUS: dict[int, type[HbllError]] = {
    **dict.fromkeys((400, 405, 413, 415, 422, 431), InvalidRequest),
    **dict.fromkeys((401, 403), Unauthorized),
    404: NotServed,
    408: Unavailable,
    429: Refused,
    502: Unavailable,
    503: Unavailable,
    504: DeadlineExceeded,
}


def error_of(status: int, content: object, retry_after: str | None = None) -> HbllError:
    """The error that an answer with this status, JSON content (anything else if it had none) and Retry-After is."""
    said = content if isinstance(content, dict) else {}
    kind = _BY_STATUS.get(status, ServerFailed if status >= 500 else UnexpectedAnswer)
    if "error" not in said and kind is NotServed:
        kind = UnexpectedAnswer
    return kind(
        str(said.get("error", "and not why, as an HBLL server would. Is it one, and is the URL right?")),
        status=status,
        code=str(said["code"]) if "code" in said else None,
        details=MappingProxyType({name: value for name, value in said.items() if name not in ("error", "code")}),
        retry_after_s=_seconds(retry_after),
    )


_STATUS_IN_STREAM = {"deadline_expired": 504, "deadline_infeasible": 504, "not_ready": 503, "queue_full": 429}


def error_in_stream(content: object) -> HbllError:
    """The same for an event `error`, which comes after the status has been sent."""
    code = content.get("code") if isinstance(content, dict) else None
    return error_of(_STATUS_IN_STREAM.get(str(code), 500), content)


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header: seconds, or a date of HTTP."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdecimal() and len(retry_after) < 10:
        return float(retry_after)
    try:
        at = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
