"""An alarm for certified early exits that have drifted: raised when audits show that the risk is no longer kept.

A certificate says that a request's early answer differs from the reference path's with probability at most epsilon, for
inputs like those that certified it. Whether they still are is audited: for a random share of requests the engine runs
the reference path as well and reports whether the answer given `differs`. Which requests is decided by `AuditCoin` at
arrival, so that no choice can depend on load or on the input; every request so chosen must be reported, one that ended
at the reference path as `False`.

The alarm is a test by betting (Waudby-Smith & Ramdas, Estimating means of bounded random variables by betting, JRSS B
2024, arXiv 2010.09686): a gambler with wealth 1 stakes a part of it on every audit, at odds that are fair or worse for
him as long as the risk is at most epsilon. His wealth is then a nonnegative supermartingale, and by Ville's inequality
(1939) the probability that it *ever* reaches 1 / alpha is at most alpha, however often one looks. Nothing here knows the
clock, the engine, or the model.
"""

from __future__ import annotations

import math
import random

_STAKES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""The nu of the bets: small ones notice a risk slightly above epsilon, large ones are quick where it is far above."""


class RiskAlarm:
    """Watches one level of risk, `epsilon`, and is falsely raised, ever, with probability at most `alpha`.

    After the differences `d_1, ..., d_n`, each 0 or 1, the evidence is the mean over stakes `nu < 1 / epsilon` of

        W_nu = prod_i (1 + nu (d_i - epsilon)).

    Raises:
        ValueError: epsilon or alpha is not between 0 and 1.
    """

    __slots__ = ("_audits", "_disagreements", "_logs", "_raised", "_threshold", "alpha", "epsilon")

    def __init__(self, epsilon: float, alpha: float = 0.01) -> None:
        for name, value in (("epsilon", epsilon), ("alpha", alpha)):
            if not 0 < value < 1:
                raise ValueError(f"{name}: expected a number between 0 and 1, got {value:g}")
        self.epsilon = epsilon
        self.alpha = alpha
        stakes = [stake for stake in _STAKES if stake * epsilon < 1]
        # The logarithms of a stake's two factors. W_nu depends on the counts alone, so it is their multiple and no error
        # can accumulate.
        self._logs = tuple((math.log1p(stake * (1 - epsilon)), math.log1p(-stake * epsilon)) for stake in stakes)
        self._threshold = -math.log(alpha)
        self._audits = 0
        self._disagreements = 0
        self._raised = False

    def observe(self, differs: bool) -> None:
        """One audit: did the early answer differ from the reference path's?"""
        self._audits += 1
        if differs:  # else the evidence falls, and there is nothing to see
            self._disagreements += 1
            self._raised = self._raised or self.log_evidence >= self._threshold

    @property
    def log_evidence(self) -> float:
        """The natural logarithm of the evidence, which neither overflows nor vanishes."""
        agreements = self._audits - self._disagreements
        logs = [self._disagreements * differs + agreements * agrees for differs, agrees in self._logs]
        largest = max(logs)
        return largest + math.log(sum(math.exp(log - largest) for log in logs) / len(logs))

    @property
    def evidence(self) -> float:
        """The gambler's wealth: 1 at first, small while the risk is kept. Beyond the largest float it is infinite."""
        try:
            return math.exp(self.log_evidence)
        except OverflowError:
            return math.inf

    @property
    def audits(self) -> int:
        """How many there were since the start or `reset`."""
        return self._audits

    @property
    def disagreements(self) -> int:
        """How many of the audits found a difference."""
        return self._disagreements

    @property
    def raised(self) -> bool:
        """Whether the evidence has ever reached `1 / alpha`; it stays so until `reset`."""
        return self._raised

    def reset(self) -> None:
        """Start again, as after a new certificate. Each start has its own probability `alpha` of a false alarm."""
        self._audits = 0
        self._disagreements = 0
        self._raised = False


class AuditCoin:
    """Says of each request at its arrival whether it will be audited: with probability `rate`, whatever else is known.

    Raises:
        ValueError: rate is not from 0 to 1.
    """

    __slots__ = ("_random", "rate")

    def __init__(self, rate: float, seed: int) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"rate: expected a number from 0 to 1, got {rate:g}")
        self.rate = rate
        self._random = random.Random(seed)  # noqa: S311  a sample, not a secret

    def toss(self) -> bool:
        """Whether to audit the request that has just arrived."""
        return self._random.random() < self.rate
