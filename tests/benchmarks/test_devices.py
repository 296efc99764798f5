from __future__ import annotations

import math

import pytest
from click.testing import CliRunner

from benchmarks.devices import Job, Link, bp_step, hbll_step, main

LINK = Link(latency_s=1e-5, bytes_per_s=5e10)
CALLS = Job(hierarchy_depth=6, batch=32, block_parameters=1e4, state_floats=16, call_s=1e-4, row_s=0)
ARITHMETIC = Job(hierarchy_depth=6, batch=32, block_parameters=1e4, state_floats=16, call_s=0, row_s=1e-6)


def test_where_only_calls_take_time_the_step_is_the_span() -> None:
    assert bp_step(CALLS, LINK, 32).compute_s == pytest.approx(2 * 63 * 1e-4)
    assert hbll_step(CALLS, LINK, 1, 32).compute_s == pytest.approx(4 * 6 * 1e-4)


def test_where_only_arithmetic_takes_time_one_device_is_slower_by_the_work_that_hbll_does_more() -> None:
    """2(N-1) - D block evaluations a row against N-1; here the root's right parent, the head, is the one left out of D."""
    bp, hbll = bp_step(ARITHMETIC, LINK, 1), hbll_step(ARITHMETIC, LINK, 1, 1)
    assert hbll.total_s / bp.total_s == pytest.approx((2 * 63 - 1) / 63)
    assert bp.gather_s == bp.sum_s == hbll.gather_s == hbll.sum_s == 0


def test_ranks_of_a_tree_hand_over_their_share_of_all_states_but_the_leaves() -> None:
    for tree_ranks in (2, 8, 32):
        step = hbll_step(ARITHMETIC, LINK, 1, tree_ranks)
        assert step.gathered_bytes == pytest.approx(4 * 16 * 32 * (2**5 - 1) / tree_ranks)
        assert step.summed_bytes == 63 * 1e4 * 4
    assert hbll_step(ARITHMETIC, LINK, 1, 8).compute_s == pytest.approx(hbll_step(ARITHMETIC, LINK, 1, 1).compute_s / 8)


def test_rows_cannot_be_divided_further_than_one_by_one() -> None:
    thin = Job(hierarchy_depth=3, batch=1, block_parameters=1e4, state_floats=16, call_s=0, row_s=1)
    assert hbll_step(thin, LINK, 1, 4).compute_s == pytest.approx(6 * 1 + 6 * 1 + 3 * 1)  # 4 leaves, 2 nodes, the root


def test_the_table_has_every_power_of_two() -> None:
    done = CliRunner().invoke(main, ["--most", "1024"])
    assert done.exit_code == 0, done.output
    devices = [line.split("|")[1].strip() for line in done.output.splitlines()[2:]]
    assert devices == [f"{2**power:,}" for power in range(11)]
    assert math.isclose(float(done.output.splitlines()[2].split("|")[8]), 5.18)
