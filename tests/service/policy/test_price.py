from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.policy.price import Option, Price
from tests.service.policy.play import FAMILIES, RISING, make_offer

unit = st.floats(0.0, 1.0)
offers = st.sampled_from(sorted(FAMILIES)).map(lambda name: make_offer(FAMILIES[name]))


def test_while_time_is_free_every_unsure_row_goes_deeper() -> None:
    price = Price(make_offer())
    for at in price._offer.climb[:-1]:
        assert price.best(price.options(at), 1e-6)[1] is not None


def test_even_a_sure_row_goes_on_while_nothing_was_ever_given_up() -> None:
    price = Price(make_offer())
    assert price.best(price.options((4,)), 0.0)[1] is not None


@given(offers)
def test_there_is_no_way_on_from_the_reference(offer) -> None:
    price = Price(offer)
    assert price.options(offer.reference) == []
    assert price.best([], 0.5) == (0.0, None)


@given(offers, unit)
def test_ways_on_lead_along_the_climb(offer, per_second) -> None:
    price = Price(offer)
    price.per_second = 100 * per_second
    for place, at in enumerate(offer.climb):
        options = price.options(at)
        assert [option.target for option in options] == list(offer.climb[place + 1 :])
        assert all(option.then >= 0 and option.cost_s > 0 for option in options)
        for option in options:  # what comes then is worth what the ways on from there are
            assert option.then == price.best(price.options(option.target), 0.5)[0]


@given(unit, unit, unit)
@settings(max_examples=50)
def test_the_dearer_time_is_the_less_it_buys(low, high, wrong) -> None:
    price = Price(make_offer())
    values = []
    for per_second in sorted((100 * low, 100 * high)):
        price.per_second = per_second
        values.append(price.best(price.options((4,)), wrong)[0])
    assert values[0] >= values[1] >= 0


@given(unit, unit, unit)
@settings(max_examples=50)
def test_the_likelier_wrong_the_more_a_way_on_is_worth(one, other, per_second) -> None:
    price = Price(make_offer())
    price.per_second = 1 + 100 * per_second
    options = price.options((4,))
    sure, unsure = sorted((one, other))
    assert price.best(options, sure)[0] <= price.best(options, unsure)[0] + 1e-12


shares = st.floats(0.001, 1.0)
some = st.lists(
    st.builds(lambda share, cost, then: Option((4, 6), share, cost, 0.0, then, 0.0), shares, shares, unit), max_size=4
)


@given(some, unit, st.sampled_from([0.0, 1e-3, 0.1, 1.0, 10.0]))
def test_a_way_on_is_worth_it_from_some_probability_of_being_wrong_on(options, wrong, per_second) -> None:
    price = Price(make_offer())
    price.per_second = per_second
    least = price.least_wrong(options)
    if wrong != pytest.approx(least, rel=1e-9, abs=1e-12):
        assert (price.best(options, wrong)[1] is not None) == (wrong > least)


def test_at_a_high_price_only_the_unsure_go_deeper_and_then_none() -> None:
    price = Price(make_offer())
    rate = max(option.share / option.cost_s for option in price.options((4,)))
    price.per_second = rate / 2
    assert price.best(price.options((4,)), 0.01)[1] is None
    assert price.best(price.options((4,)), 0.99)[1] is not None
    price.per_second = 100 * rate
    assert price.best(price.options((4,)), 1.0)[1] is None


@given(st.lists(unit, min_size=1, max_size=30))
@settings(max_examples=50)
def test_what_is_given_up_raises_the_price_towards_its_own_rate(confidences) -> None:
    price = Price(make_offer())
    (option, *_) = price.options((4,))
    best = option.share / option.cost_s
    for confidence in confidences:
        before = price.per_second
        price.given_up((4,), (4, 6), confidence)
        assert before <= price.per_second <= max(before, (1 - confidence) * best * (1 + 1e-9))


def test_the_price_falls_only_while_the_device_is_idle() -> None:
    price = Price(make_offer())
    price.per_second = 1.0
    price.busy(5.0)
    assert price.per_second == 1.0
    price.idle(6.0)
    price.idle(6.01)  # still, not anew
    price.busy(6.02)
    assert price.per_second == pytest.approx(1 / 2.718281828)
    price.busy(9.0)
    assert price.per_second == pytest.approx(1 / 2.718281828)


def test_the_best_option_is_the_one_of_most_net_gain() -> None:
    price = Price(make_offer(RISING))
    price.per_second = 1.0
    cheap, vain = Option((4, 6), 0.2, 0.01, 0.02, 0.0, 0.0), Option((4, 5), 0.1, 0.2, 0.4, 0.0, 0.0)
    dear = Option((4, 6, 7), 0.4, 0.3, 0.6, 0.0, 0.0)
    assert price.best([vain, dear, cheap], 1.0) == (pytest.approx(0.19), (4, 6))
    assert price.best([vain], 1.0) == (0.0, None)
    followed = cheap._replace(target=(4, 5), then=0.1)
    assert price.best([cheap, followed], 1.0)[1] == (4, 5)


def test_an_option_that_takes_longer_than_is_left_is_none() -> None:
    """A row was once answered for lack of time for the best step, though a smaller one would have fitted."""
    price = Price(make_offer(RISING))
    near, far = Option((4, 6), 0.2, 0.01, 0.02, 0.0, 0.0), Option((4, 6, 7), 0.4, 0.01, 0.06, 0.0, 0.0)
    assert price.best([near, far], 1.0, 0.07)[1] == (4, 6, 7)
    assert price.best([near, far], 1.0, 0.05)[1] == (4, 6)
    assert price.best([near, far], 1.0, 0.01)[1] is None


def test_what_could_follow_counts_only_if_there_is_time_for_it() -> None:
    price = Price(make_offer(RISING))
    near, far = Option((4, 6), 0.2, 0.01, 0.02, 0.9, 0.06), Option((4, 6, 7), 0.4, 0.01, 0.06, 0.0, 0.0)
    assert price.best([near, far], 1.0, 0.09)[1] == (4, 6)
    assert price.best([near, far], 1.0, 0.07)[1] == (4, 6, 7)
