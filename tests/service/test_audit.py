from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from service.audit import AuditCoin, RiskAlarm

EPSILONS = st.floats(0.001, 0.999)


def observed(alarm: RiskAlarm, differences: Iterable[bool]) -> RiskAlarm:
    for differs in differences:
        alarm.observe(differs)
    return alarm


def audits_until_raised(alarm: RiskAlarm, differences: Iterable[bool]) -> float:
    for number, differs in enumerate(differences, 1):
        alarm.observe(differs)
        if alarm.raised:
            return number
    return math.inf


@given(EPSILONS, st.lists(st.booleans(), max_size=60))
def test_the_evidence_is_the_mean_of_the_products(epsilon: float, differences: list[bool]) -> None:
    alarm = observed(RiskAlarm(epsilon), differences)
    stakes = [stake for stake in (0.25, 0.5, 1, 2, 4, 8) if stake < 1 / epsilon]
    products = [math.prod(1 + stake * (differs - epsilon) for differs in differences) for stake in stakes]
    assert alarm.evidence == pytest.approx(sum(products) / len(products), rel=1e-9)
    assert alarm.log_evidence == pytest.approx(math.log(sum(products) / len(products)), rel=1e-9, abs=1e-9)
    assert (alarm.audits, alarm.disagreements) == (len(differences), sum(differences))


@given(EPSILONS, st.floats(0.001, 0.5), st.lists(st.booleans(), max_size=60))
def test_it_is_raised_when_the_evidence_has_ever_reached_one_over_alpha(epsilon, alpha, differences) -> None:
    alarm = RiskAlarm(epsilon, alpha)
    reached = False
    for differs in differences:
        alarm.observe(differs)
        reached = reached or alarm.log_evidence >= math.log(1 / alpha)
        assert alarm.raised == reached


@given(EPSILONS, st.integers(1, 12), st.floats(0, 1).map(lambda share: round(share, 6)))
def test_fair_odds_keep_the_expected_evidence_at_1_and_a_lower_risk_below(epsilon, audits, fraction) -> None:
    """The property behind the guarantee, exactly: the mean over all outcomes of `audits` audits. That the wealth at one
    count of disagreements depends on no more than the count is the mean of the products, tested above."""

    def expected(risk: float) -> float:
        wealth = [observed(RiskAlarm(epsilon), [i < k for i in range(audits)]).evidence for k in range(audits + 1)]
        return float(np.dot(binom.pmf(range(audits + 1), audits, risk), wealth))

    assert expected(epsilon) == pytest.approx(1.0, rel=1e-6)
    assert expected(epsilon * fraction) <= 1 + 1e-6


@pytest.mark.parametrize(("epsilon", "alpha"), [(0.05, 0.01), (0.05, 0.1), (0.01, 0.1), (0.2, 0.1)])
def test_false_alarms_are_no_more_than_promised(epsilon: float, alpha: float) -> None:
    """2,000 runs of 1,000 audits at a true risk of exactly epsilon; one-sided binomial test."""
    differences = (np.random.default_rng(11).random((2000, 1000)) < epsilon).tolist()
    raised = sum(observed(RiskAlarm(epsilon, alpha), run).raised for run in differences)
    assert binomtest(raised, 2000, alpha, alternative="greater").pvalue > 0.01


def test_twice_the_risk_is_noticed_within_400_audits() -> None:
    differences = (np.random.default_rng(12).random((300, 5000)) < 0.1).tolist()
    assert np.median([audits_until_raised(RiskAlarm(0.05), run) for run in differences]) < 400


def test_half_of_wrong_answers_are_noticed_at_once() -> None:
    assert audits_until_raised(RiskAlarm(0.05), [True, False] * 10) <= 8


def test_it_stays_raised_until_it_is_reset() -> None:
    alarm = observed(RiskAlarm(0.05), [True] * 10)
    assert alarm.raised
    observed(alarm, [False] * 1000)
    assert alarm.evidence < 1
    assert alarm.raised
    alarm.reset()
    assert not alarm.raised
    assert (alarm.evidence, alarm.audits, alarm.disagreements) == (1.0, 0, 0)
    assert not observed(alarm, [False] * 1000).raised


def test_a_million_audits_neither_overflow_nor_wear_out() -> None:
    for differs, evidence in ((False, 0.0), (True, math.inf)):
        alarm = observed(RiskAlarm(0.05), (differs for _ in range(1_000_000)))
        assert alarm.evidence == evidence
        assert math.isfinite(alarm.log_evidence)
        assert alarm.raised == differs
    mixed = observed(RiskAlarm(0.05), (index % 20 == 0 for index in range(1_000_000)))  # exactly at epsilon
    assert not mixed.raised
    stakes = np.array([0.25, 0.5, 1, 2, 4, 8])
    logs = 50_000 * np.log1p(stakes * 0.95) + 950_000 * np.log1p(-stakes * 0.05)
    assert mixed.log_evidence == pytest.approx(np.logaddexp.reduce(logs) - math.log(6), rel=1e-12)


@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.1, 5.0, math.nan])
def test_impossible_arguments_are_refused_by_name(wrong: float) -> None:
    with pytest.raises(ValueError, match="epsilon: expected a number between 0 and 1"):
        RiskAlarm(wrong)
    with pytest.raises(ValueError, match="alpha: expected a number between 0 and 1"):
        RiskAlarm(0.05, wrong)
    if wrong not in (0.0, 1.0):
        with pytest.raises(ValueError, match="rate: expected a number from 0 to 1"):
            AuditCoin(wrong, 0)


def test_the_coin_is_fair_seeded_and_certain_at_the_ends() -> None:
    coin, same, other = AuditCoin(0.1, 1), AuditCoin(0.1, 1), AuditCoin(0.1, 2)
    tosses = [coin.toss() for _ in range(20_000)]
    assert tosses == [same.toss() for _ in range(20_000)]
    assert tosses != [other.toss() for _ in range(20_000)]
    assert binomtest(sum(tosses), 20_000, 0.1).pvalue > 0.001
    never, always = AuditCoin(0.0, 1), AuditCoin(1.0, 1)
    assert not any(never.toss() for _ in range(1000))
    assert all(always.toss() for _ in range(1000))
