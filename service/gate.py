"""Where requests wait for the event loop, in a crowd: between their headers and the app, where waiting costs nothing.

A loop that begins with every request as soon as it is there begins with hundreds in a burst. All of them take their share
of its time before the first is answered, the device waits meanwhile, and all are late. So only a few begin at a time;
between these, answers are sent and the next batch is chosen. Whoever waited too long for an answer in time is refused
here, which takes a fraction of what the app takes for a refusal: else an overload would be spent on those who are late.
And who would surely be in time begins before those who only might be: else an overload would be spent on who is just late.
"""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Literal, Protocol, TypeVar

from service.answers import Answer
from service.errors import DeadlineExpired

AT_ONCE = 8
"""How many begin before the loop turns to what else there is: measured from 2 to 128."""

_LOOKED_AT = 16
"""How many that wait are looked at to find one who is sure to be in time. In a burst all become doubtful at once, and to
look at a thousand of them takes as long as a budget."""

_LATEST, _LIKELY, _SURELY = 64, 0.75, 0.97  # what an answer takes is a quantile of so many

_LEAST_IN_HAND = 2 * AT_ONCE  # those of one turn run while those of the next are read
_IN_HAND_SHARE = 0.5  # of a budget
_REMEMBERED = 0.98  # of what is known of crowds, from one turn of the loop to the next
BLOCKED_S = 0.001
"""After which it is seen again whether there is room."""

Outlook = Literal["sure", "doubtful", "late"]
"""Whether a request that begins now will be answered in time: by 0.97 of the latest answers, by less, by less than 0.75."""

_MOST_OF_BUDGET = 0.75
"""Nobody is refused who waited for less than the rest. Where there is time, answers take it, for more blocks; and right
after a stall they took longer than they will. (Half costs 2.7 points in the simulator's mean, nine tenths nothing.)"""


class Unread(Protocol):
    """A request whose headers are there, and which waits to be read."""

    @property
    def gone(self) -> bool:
        """Its client is."""
        ...

    @property
    def arrived_s(self) -> float:
        """When it did, on the monotonic clock; its budget runs from then."""
        ...

    def budget_s(self) -> float | None:
        """Its budget; none if it has none, or none that can be seen yet."""
        ...

    def begin(self) -> None:
        """Hand it to the app."""
        ...

    def refuse(self) -> None:
        """Its budget would run out."""
        ...

    def forget(self) -> None:
        """Its client has gone."""
        ...


class Pace:
    """What answers take as of late, from when their requests begin; what some of them take to go deeper than they must does
    not count. A request is measured by answers to budgets that are not longer than its own, as who may wait for long says
    nothing about those who may not; and by those that are no older than its budget: where all are refused, nothing is known
    in the end, and it is seen how long answers take now. Times are on the monotonic clock.
    """

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float, float]] = deque(maxlen=_LATEST)  # when, the budget, what it took
        self._known: tuple[float, float, tuple[float, float]] | None = None  # until when, the budget, what was said of it

    def answered(self, budget_s: float, took_s: float, now_s: float) -> None:
        """A request with this budget has its answer, so long after it began, the time to send it included."""
        self._latest.append((now_s, budget_s, took_s))
        self._known = None

    def ended(self, budget_s: float, begun_s: float, answer: Answer | None, now_s: float) -> None:
        """A request with this budget, which began at `begun_s`, has been sent this answer; or none, as the budget ran out.
        That takes as long as the budget, at least: did it say nothing, others would begin with as little time left."""
        took_s = budget_s if answer is None else now_s - begun_s - (answer.decided_s - answer.answered_s)
        self.answered(budget_s, took_s, now_s)

    def takes_s(self, budget_s: float, now_s: float) -> tuple[float, float]:
        """How long before the end of its budget a request is to begin: the 0.75 quantile, and at most three quarters of the
        budget (with less, most would be late), and the 0.97 quantile (with that, hardly any). 0 while nothing is known."""
        if self._known is not None and self._known[1] == budget_s and now_s <= self._known[0]:
            return self._known[2]
        measured = [each for each in self._latest if each[1] <= budget_s and now_s <= each[0] + budget_s]
        if not measured:
            return 0.0, 0.0
        took_s = sorted([each[2] for each in measured])
        last = len(took_s) - 1
        takes_s = min(took_s[int(_LIKELY * last)], _MOST_OF_BUDGET * budget_s), took_s[int(_SURELY * last)]
        self._known = measured[0][0] + budget_s, budget_s, takes_s
        return takes_s

    def outlook(self, arrived_s: float, budget_s: float | None, now_s: float) -> Outlook:
        """Of a request that came at `arrived_s`, if it begins now."""
        if budget_s is None:
            return "sure"
        likely_s, surely_s = self.takes_s(budget_s, now_s)
        left_s = arrived_s + budget_s - now_s
        return "late" if left_s < likely_s else "doubtful" if left_s < surely_s else "sure"


class Room:
    """How many requests may be in hand before one that begins: begun, with no answer yet, and a budget that ends sooner.

    The loop answers no more than it reads. Who begins waits for those in hand, so if these are more than the loop reads in
    half its budget, that half is gone: where reading takes long, as of JSON and pictures, all would be just late.
    """

    def __init__(self) -> None:
        self._begun = self._took_s = 0.0

    def turned(self, begun: int, took_s: float) -> None:
        """A turn of the loop in a crowd took it so long, and so many began in it: one at least."""
        self._begun = self._begun * _REMEMBERED + begun
        self._took_s = self._took_s * _REMEMBERED + took_s

    def most(self, budget_s: float | None) -> float:
        """With this budget. All without one, and while nothing is known."""
        if not self._took_s or budget_s is None:
            return math.inf
        return max(_LEAST_IN_HAND, _IN_HAND_SHARE * budget_s * self._begun / self._took_s)


R = TypeVar("R")


class Line(Generic[R]):
    """Requests that wait to begin, in the order in which they came: but whoever is sure to be in time goes before those who
    are not. Who has no budget, or none that shows, has the time to wait until those before are through. `asks` says when a
    request came, and its budget if it has one; it is asked when the request is to be next."""

    def __init__(self, pace: Pace, asks: Callable[[R], tuple[float, float | None]]) -> None:
        self._pace, self._asks = pace, asks
        self._waiting: deque[R] = deque()
        self._doubtful: deque[tuple[R, float, float | None]] = deque()  # were next, and let others go before

    def __len__(self) -> int:
        return len(self._waiting) + len(self._doubtful)

    def append(self, request: R) -> None:
        """It waits from now on."""
        self._waiting.append(request)

    def next(self, now_s: float) -> tuple[R, bool]:
        """Who waits no more, and whether it would be late.

        Raises:
            IndexError: nobody waits.
        """
        outlook = self._pace.outlook
        if self._doubtful:
            request, arrived_s, budget_s = self._doubtful[0]
            if (seems := outlook(arrived_s, budget_s, now_s)) != "doubtful":
                self._doubtful.popleft()
                return request, seems == "late"
        for _ in range(min(_LOOKED_AT, len(self._waiting))):
            request = self._waiting.popleft()
            arrived_s, budget_s = self._asks(request)
            seems = outlook(arrived_s, budget_s, now_s)
            if seems != "doubtful" and (budget_s is not None or not self._doubtful):
                return request, seems == "late"
            self._doubtful.append((request, arrived_s, budget_s))
        return self._doubtful.popleft()[0], False


def late(arrived_s: float) -> DeadlineExpired:
    """The error of a request that came at `arrived_s` and waits no more, as it would not be in time."""
    waited_ms = 1000 * (time.monotonic() - arrived_s)
    return DeadlineExpired(
        f"the latency budget would run out: the request waited {waited_ms:.0f} ms for the server to read it"
    )


class Gate:
    """Lets requests begin, few at a time. Used on one event loop.

    `pace` is to be told of answers; `in_hand` says when the budgets end, on the monotonic clock, of the requests that have
    begun here and have no answer yet, if they have a budget.
    """

    def __init__(self, in_hand: Callable[[], Sequence[float]] = tuple) -> None:
        self.pace = Pace()
        self._in_hand = in_hand
        self._room = Room()
        self._line = Line[Unread](self.pace, lambda request: (request.arrived_s, request.budget_s()))
        self._next: Unread | None = None  # was next in the line, and waits for room
        self._begun = 0  # in this turn of the loop
        self._turn_s: float | None = None  # when it began, if there were requests to be read then
        self._scheduled = False  # the next turn is

    def waiting(self) -> int:
        """How many wait; those that begin at once never do."""
        return len(self._line) + (self._next is not None)

    def came_s(self, now_s: float) -> float:
        """When a request that the loop reads now is taken to have come. In a crowd the loop has been busy since its turn
        began, and nobody sees what comes to a socket meanwhile: that takes of the budget, too."""
        return now_s if self._turn_s is None else self._turn_s

    def enter(self, request: Unread) -> None:
        """A request begins now, or when it is its turn."""
        if self._begun == AT_ONCE or self.waiting():
            self._line.append(request)
            return
        self._schedule()
        self._begun += 1
        request.begin()

    def _schedule(self, after_s: float = 0) -> None:
        if not self._scheduled:
            self._scheduled = True
            loop = asyncio.get_running_loop()
            if after_s:
                loop.call_later(after_s, self._turn)
            else:
                loop.call_soon(self._turn)

    def _turn(self) -> None:
        """The loop has been through all that was there when the latest began."""
        self._scheduled = False
        now_s = time.monotonic()
        if self._turn_s is not None and self._begun:
            self._room.turned(self._begun, now_s - self._turn_s)
        self._begun = 0
        if not self.waiting():
            self._turn_s = None
            return
        self._turn_s = now_s
        try:
            self._begin_some(now_s)
        finally:
            if self._begun or self._next is None:
                self._schedule()
            else:
                self._turn_s = None  # the loop has time to see who comes
                self._schedule(BLOCKED_S)

    def _begin_some(self, now_s: float) -> None:
        in_hand: list[float] | None = None
        for _ in range(AT_ONCE):
            if self._next is not None:
                request, self._next = self._next, None
                is_late = self.pace.outlook(request.arrived_s, request.budget_s(), now_s) == "late"
            elif self._line:
                request, is_late = self._line.next(now_s)
            else:
                return
            if request.gone:
                request.forget()
                continue
            if is_late:
                request.refuse()
                continue
            budget_s = request.budget_s()
            if budget_s is not None and (most := self._room.most(budget_s)) < math.inf:
                if in_hand is None:
                    in_hand = sorted(self._in_hand())
                if bisect_right(in_hand, request.arrived_s + budget_s) + self._begun >= most:
                    self._next = request
                    return
            self._begun += 1
            request.begin()
