"""Whether certified early exits still keep their promise: audits of served requests, one alarm per certified level."""

from __future__ import annotations

import math
import secrets
from dataclasses import replace

from family.manifest import Manifest
from service.audit import AuditCoin, RiskAlarm
from service.metrics import Metrics
from service.policy.wish import Wish


class DriftWatch:
    """The alarms of one version of a model, which `labels` name in metrics. Once one is raised its level no longer exits
    early, until `reset`."""

    def __init__(
        self, labels: tuple[str, str], manifest: Manifest, rate: float, metrics: Metrics, seed: int | None = None
    ) -> None:
        levels = manifest.certificate.levels if manifest.certificate else ()
        self._labels = labels
        self._metrics = metrics
        self._coin = AuditCoin(rate, secrets.randbits(64) if seed is None else seed) if levels and rate > 0 else None
        self.alarms = {level.epsilon: RiskAlarm(level.epsilon) for level in levels}
        self.reset()

    def admit(self, wish: Wish) -> tuple[Wish, bool]:
        """The wish as it may be fulfilled, and whether its request is to be audited: decided before anything is known."""
        if wish.risk is None:
            return wish, False
        if self.alarms[wish.risk].raised:
            return replace(wish, exit_at=math.inf), False
        return wish, self._coin is not None and self._coin.toss()

    def observe(self, epsilon: float, differs: bool) -> None:
        """The result of an audit."""
        alarm = self.alarms[epsilon]
        alarm.observe(differs)
        self._metrics.audits.labels(*self._labels, f"{epsilon:g}", str(differs).lower()).inc()
        self._metrics.drift.labels(*self._labels, f"{epsilon:g}").set(alarm.raised)

    def reset(self) -> None:
        """An operator trusts the certificate again: all audits are forgotten."""
        for epsilon, alarm in self.alarms.items():
            alarm.reset()
            self._metrics.drift.labels(*self._labels, f"{epsilon:g}").set(False)

    @property
    def raised(self) -> list[float]:
        """The levels whose alarm is raised."""
        return [epsilon for epsilon, alarm in self.alarms.items() if alarm.raised]
