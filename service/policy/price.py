"""Which rows are worth going deeper for: a shadow price of the device's time.

Where there is more to gain than time for it, time has a price: the gain per second that is given up elsewhere. It
rises when rows have to be answered that could have gained more per second, and falls while the device is idle. A row
goes deeper only if what it is expected to gain exceeds what its share of the device's time is worth.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from family.tree import Path
from service.policy.state import Offer, segment_between
from service.profile import Segment

_RISE = 0.005
"""How far the price goes towards the gain per second of one row that was given up."""

_FALL_S = 0.02
"""Idle time in which it falls to 1/e."""

COIN = 0.5
"""Of rows that go deeper and are still wrong now and then, confidence is taken to tell those apart that are wrong so
often; the others are then right."""


class Option(NamedTuple):
    """A step to the answer of `target`: it puts right `share` of the wrong answers, takes `cost_s` of the device per
    row and at least `least_s` in all. What follows is worth `then` to a row that is unsure there and has `then_s` more."""

    target: Path
    share: float
    cost_s: float
    least_s: float
    then: float
    then_s: float


class _Step(NamedTuple):
    """What never changes of an option: which share of the wrong answers it puts right, what it runs, and how long that
    typically takes, so many rows and one."""

    target: Path
    share: float
    segment: Segment
    rows_s: float
    one_s: float

    @staticmethod
    def of(offer: Offer, at: Path, target: Path, rows: int) -> _Step:
        segment = segment_between(at, target)
        typical_s = offer.profile.typical_s
        return _Step(target, offer.gain(at, target, 0.0), segment, typical_s(segment, rows), typical_s(segment, 1))


class Price:
    """The price of a second of the device, in expected right answers, and what it makes worthwhile."""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self._rows = max(1, offer.profile.max_batch // 2)  # of the batches in which deeper work is imagined
        self._steps = {
            at: [_Step.of(offer, at, target, self._rows) for target in offer.climb[place + 1 :]]
            for place, at in enumerate(offer.climb)
        }
        self._idle_since_s: float | None = None
        self.per_second = 0.0

    def idle(self, now_s: float) -> None:
        """The device has nothing to do, from now on."""
        if self._idle_since_s is None:
            self._idle_since_s = now_s

    def busy(self, now_s: float) -> None:
        """It has, again."""
        if self._idle_since_s is not None:
            self.per_second *= math.exp(-(now_s - self._idle_since_s) / _FALL_S)
            self._idle_since_s = None

    def given_up(self, answered: Path, target: Path, confidence: float) -> None:
        """A row was answered that could have gone on to `target`, had there been time."""
        rate = self._offer.gain(answered, target, confidence) / self._cost_s(answered, target)
        if rate > self.per_second:
            self.per_second += _RISE * (rate - self.per_second)

    def options(self, answered: Path, longest_s: float = math.inf) -> list[Option]:
        """The ways on from the answer of a path, at the present price, if no run may be longer than `longest_s`."""
        assert answered in self._steps
        rows = self._rows  # `latency_s` of the profile, by hand: this is asked for after every run
        ratio, wait_s = self._offer.profile.pace(rows)
        one_ratio, _ = self._offer.profile.pace(1)
        options: list[Option] = []
        then: dict[Path, tuple[float, float]] = {}
        for at in reversed(self._offer.climb):
            options = []
            for target, share, segment, rows_s, one_s in self._steps[at]:
                least_s = one_s * one_ratio + wait_s
                if least_s > longest_s:
                    least_s = self._offer.in_pieces_s(segment, longest_s)
                options.append(Option(target, share, (rows_s * ratio + wait_s) / rows, least_s, *then[target]))
            if at == answered:
                break
            value, following = self.best(options, COIN)
            then[at] = value, next((option.least_s for option in options if option.target == following), 0.0)
        return options

    def least_wrong(self, options: list[Option]) -> float:
        """How likely an answer has to be wrong, and more, for a way on to be worth it to a row that has the time: where
        the value of the best of them (`best`), which rises with that, leaves zero. Infinity if there is no way."""
        if self.per_second == 0:
            return -math.inf if options else math.inf  # free: no gain is too small
        least = math.inf
        for option in options:  # of which each puts right some
            cost, stays = self.per_second * option.cost_s, 1 - option.share
            wrong = cost / (option.share + stays / COIN * option.then)
            if stays * wrong > COIN:  # all that are wrong after the step are unsure then
                wrong = (cost - option.then) / option.share
            least = min(least, wrong)
        return least

    def best(self, options: list[Option], wrong: float, left_s: float = math.inf) -> tuple[float, Path | None]:
        """The value of the best way on, net of the price, for a row whose answer is wrong with this probability and that
        has so much time left, and where it leads; none if no way is worth it."""
        value, best = 0.0, None
        for option in options:
            if option.least_s > left_s:
                continue
            gain = option.share * wrong
            unsure = min(1.0, (wrong - gain) / COIN)
            then = option.then if option.least_s + option.then_s <= left_s else 0.0
            net = gain - self.per_second * option.cost_s + unsure * then
            if net > value or (net == value and self.per_second == 0):  # free: no gain is too small
                value, best = net, option.target
        return value, best

    def _cost_s(self, answered: Path, target: Path) -> float:
        return self._offer.profile.latency_s(segment_between(answered, target), self._rows) / self._rows
