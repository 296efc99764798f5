"""The rules of `hbll reproduce local-rules`: how far gradients reach, and that the first of them is HBLL's own step."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from family.tree import Tree
from hbll.cli import main
from training.blocks import ResidualBlocks
from training.config import ResMlpConfig
from training.experiments import local_rules
from training.experiments.local_rules import RULES, Learner, left_nodes, tree_step
from training.model import build_family
from training.objective import hbll_step

MODEL = ResMlpConfig(hierarchy_depth=3, width=8, hidden=16)


def learner(rule: str) -> Learner:
    made = Learner(build_family(MODEL, seed=0), RULES[rule])
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return made


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(16, 28, 28, generator=generator), torch.randint(10, (16,), generator=generator)


def gradients(made: Learner) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}


def test_the_first_rule_is_hbll() -> None:
    ours, batched = learner("hbll"), learner("hbll")
    x, y = batch()
    loss = RULES["hbll"].step(ours, x, y, np.random.default_rng(0))
    expected = hbll_step(batched.family, x, y, nudge=0.5, noise=0.0, generator=torch.Generator()).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients(batched).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("rule", "reach"),
    # Blocks from which a gradient comes to each of the blocks 1..7, itself left out: those after it in its window.
    [
        ("cut-1", {}),
        ("cut-2", {1: {2}, 3: {4}, 5: {6}}),
        ("overlapping", {node: {node + 1} for node in range(1, 7)}),
        ("chains", {node: set(range(node + 1, 8)) for node in range(1, 7)}),
    ],
)
def test_no_gradient_leaves_its_window(rule: str, reach: dict[int, set[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the full path. Whether the gradient of a block depends on the weights of one after it."""
    monkeypatch.setattr(local_rules, "sample_chain", lambda tree, _: tree.full)
    x, y = batch()

    def block_gradients(changed: int | None) -> Tensor:
        made = learner(rule)
        assert isinstance(made.family.blocks, ResidualBlocks)
        if changed is not None:
            with torch.no_grad():
                made.family.blocks.down_weight[changed - 1] *= 1.5
        RULES[rule].step(made, x, y, np.random.default_rng(0))
        assert made.family.blocks.up_weight.grad is not None
        return made.family.blocks.up_weight.grad

    before = block_gradients(None)
    for changed in Tree(3).nodes:
        after = block_gradients(changed)
        earlier = {node for node in range(1, changed) if not torch.equal(before[node - 1], after[node - 1])}
        assert earlier == {node for node in range(1, changed) if changed in reach.get(node, set())}


def test_a_label_at_each_node_reaches_blocks_whose_latent_loss_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left subtrees that are the identity have no latent loss left to lessen; the label moves them."""
    monkeypatch.setattr(local_rules, "_NUDGE", 0.0)
    x, y = batch()
    moved = {}
    for labels in (False, True):
        made = learner("hbll")
        blocks = made.family.blocks
        assert isinstance(blocks, ResidualBlocks)
        with torch.no_grad():
            blocks.down_weight.zero_()  # f_n and its right parent are the identity
        tree_step(made, x, y, labels=labels)
        assert blocks.down_weight.grad is not None
        moved[labels] = blocks.down_weight.grad[[node - 1 for node in (1, 3, 5)]].abs().max().item()
    assert moved[False] < 1e-8 < 1e-4 < moved[True]


def test_a_teacher_follows_and_is_not_trained() -> None:
    made = learner("hbll-taught")
    x, y = batch()
    count = len(list(made.parameters()))
    RULES["hbll-taught"].step(made, x, y, np.random.default_rng(0))
    assert len(list(made.parameters())) == count
    states, before = made.taught(x)
    assert len(states) == 7
    assert torch.allclose(before.exp().sum(dim=1), torch.ones(16))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1
    _, after = made.taught(x)
    assert not torch.equal(before, after)


def test_shifts_of_hops_begin_at_zero_and_are_trained() -> None:
    plain, conditioned = learner("hbll"), learner("hbll-conditioned")
    x, y = batch()
    rng = np.random.default_rng(0)
    same = RULES["hbll"].step(plain, x, y, rng).item()
    assert RULES["hbll-conditioned"].step(conditioned, x, y, rng).item() == pytest.approx(same)
    assert conditioned.shifts is not None
    assert conditioned.shifts.grad is not None
    assert conditioned.shifts.grad[4, 6].abs().sum() > 0
    assert conditioned.shifts.grad[0, 7].abs().sum() == 0  # which is no hop


def test_left_subtrees_that_are_woken_move_the_state() -> None:
    plain, woken = learner("hbll"), learner("hbll-awake")
    assert isinstance(plain.family.blocks, ResidualBlocks)
    assert isinstance(woken.family.blocks, ResidualBlocks)
    ratio = woken.family.blocks.down_weight / plain.family.blocks.down_weight
    assert left_nodes(Tree(3)) == [1, 2, 3, 5]
    assert torch.allclose(ratio[[0, 1, 2, 4]], torch.tensor(4.0))
    assert torch.equal(ratio[[3, 5, 6]], torch.ones_like(ratio[[3, 5, 6]]))


def test_the_report_has_a_row_for_each_rule(tmp_path: Path) -> None:
    command = ["reproduce", "local-rules", "--scale", "smoke", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    with (tmp_path / "local-rules-smoke" / "local-rules.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["row"] for row in rows} == {rule.title for rule in RULES.values()}
    values = {(row["row"], row["column"]): float(row["value"]) for row in rows}
    assert values["HBLL", "rise"] == pytest.approx(values["HBLL", "3 blocks"] - values["HBLL", "1 block"], abs=1e-3)
    assert all(value > 0 for (_, column), value in values.items() if column == "left blocks move")
