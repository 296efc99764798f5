"""The time of one call: how long it may take, what is left of its budget for the next request, and how long to wait
before it. Arithmetic on a clock that is given; nothing is sent and nobody sleeps here.

Why no library: tenacity and stamina repeat one function and httpx-retries one request; here every request says what is left
of the budget, a server's Retry-After counts, and both are held within one deadline. That is the arithmetic below; the loop
around it, all that a library would save, is six lines.
"""

from __future__ import annotations

from dataclasses import dataclass

from hbll.client.errors import DeadlineExceeded, HbllError

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 2.0
"""Most that is waited after the first failure, and after any; in between it doubles."""


@dataclass(slots=True)
class Attempts:
    """A call that began at `started_s`, may take `timeout_s` and be tried again `retries` times.

    Its answer is due `budget_ms` after it began, which is as the caller sees it: what was spent on this side, and on
    earlier attempts, is not offered to the server again.
    """

    started_s: float
    timeout_s: float
    budget_ms: float | None
    retries: int
    failures: int = 0

    def left_s(self, now_s: float) -> float:
        """Seconds until the call has to be over; not below 0."""
        return max(0.0, self.started_s + self.timeout_s - now_s)

    def budget_left_ms(self, now_s: float) -> float | None:
        """The budget of a request that is sent now; none if the call has none.

        Raises:
            DeadlineExceeded: nothing is left of it.
        """
        if self.budget_ms is None:
            return None
        left_ms = self.budget_ms - 1000 * (now_s - self.started_s)
        if left_ms <= 0:
            raise DeadlineExceeded(f"the budget of {self.budget_ms:g} ms was spent before a request could be sent")
        return left_ms

    def wait_s(self, error: HbllError, now_s: float, jitter: float) -> float | None:
        """Seconds to wait before the next request, after one that ended in `error`; none if there should not be one: that
        kind of error stays, all retries are used, or neither the deadline nor the budget reaches so far.

        Exponential backoff with full jitter (a share `jitter`, 0..1, drawn uniformly), and not before the server's
        Retry-After.
        """
        self.failures += 1
        if not error.transient or self.failures > self.retries:
            return None
        doubled_s = _FIRST_WAIT_S * 2.0 ** min(self.failures - 1, 30)
        wait_s = (error.retry_after_s or 0.0) + jitter * min(_LONGEST_WAIT_S, doubled_s)
        useful_s = self.left_s(now_s)
        if self.budget_ms is not None:
            useful_s = min(useful_s, self.started_s + self.budget_ms / 1000 - now_s)
        return wait_s if wait_s < useful_s else None
