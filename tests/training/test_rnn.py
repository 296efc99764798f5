from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from family.tree import Tree
from training.rnn import (
    ChainRnn,
    ElmanCell,
    FusedGru,
    GruCell,
    TreeRnn,
    as_sequence,
    bptt_step,
    consistency_loss,
    roll,
    sweep,
    tree_step,
)

DEPTH = 3
STEPS = 2**DEPTH
BOTH = pytest.mark.parametrize("cell", ["gru", "elman"])


def _model(cell: str, seed: int = 0) -> TreeRnn:
    return TreeRnn(Tree(DEPTH), cell, inputs=2, width=6, classes=4, seed=seed)


def _batch(rows: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, STEPS, 2, generator=generator), torch.randint(4, (rows,), generator=generator)


def _tree_states(model: TreeRnn, x: Tensor) -> Tensor:
    """`h_0 .. h_{N-1}` node by node, as the definition says."""
    states = [model.start(x)] + [torch.empty(0)] * (STEPS - 1)
    for level in reversed(range(DEPTH)):
        for node in model.tree.level_nodes(level):
            left, _ = model.tree.parents(node)
            states[node] = model.cells[level](states[left], x[:, left:node].flatten(1))
    return torch.stack(states).detach()


def _node_by_node_loss(model: TreeRnn, x: Tensor, y: Tensor) -> Tensor:
    states, total = _tree_states(model, x), torch.zeros(())
    for node in model.tree.nodes:
        cell = model.cells[model.tree.level(node)]
        left, right = model.tree.parents(node)
        b = cell(cell(states[left], x[:, left:node].flatten(1)), x[:, node:right].flatten(1))
        if right == STEPS:
            total = total + nn.functional.cross_entropy(model.head(b), y)
        else:
            total = total + 0.5 * ((b - states[right]) ** 2).sum(dim=1).mean()
    return total


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@BOTH
def test_the_batched_step_equals_the_node_by_node_one(cell: str) -> None:
    (x, y), batched, single = _batch(), _model(cell), _model(cell)
    loss = tree_step(batched, x, y)
    expected = _node_by_node_loss(single, x, y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(_gradients(batched), _gradients(single), rtol=1e-5, atol=1e-6)


@BOTH
def test_a_state_depends_on_nothing_that_comes_after_it(cell: str) -> None:
    model, (x, _) = _model(cell), _batch()
    before = _tree_states(model, x)
    for node in range(1, STEPS):
        changed = x.clone()
        changed[:, node:] += 1
        after = _tree_states(model, changed)
        assert torch.equal(after[: node + 1], before[: node + 1])
        if node < STEPS - 1:
            assert not torch.equal(after[node + 1 :], before[node + 1 :])


def test_a_levels_loss_reaches_its_own_cell_and_the_head_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each of the step's backward passes, one a level and one of the consistency stage, added to gradients."""
    model, (x, y) = _model("gru"), _batch()
    reached: list[set[str]] = []
    backward = Tensor.backward

    def watched(loss: Tensor) -> None:
        before = _gradients(model)
        backward(loss)
        after = _gradients(model)
        changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
        reached.append({".".join(name.split(".")[:2]) if name.startswith("cells") else "head" for name in changed})

    monkeypatch.setattr(Tensor, "backward", watched)
    tree_step(model, x, y, sweeps=2)
    assert reached == [{"cells.2", "head"}, {"cells.1", "head"}, {"cells.0", "head"}, {"cells.0"}]


@BOTH
def test_as_many_sweeps_as_steps_equal_the_rollout(cell: str) -> None:
    model, (x, _) = _model(cell), _batch()
    states = _tree_states(model, x)
    h, chain = model.start(x), []
    for step in range(STEPS - 1):
        h = model.cells[0](h, x[:, step])
        chain.append(h)
    torch.testing.assert_close(sweep(model, x, states, STEPS), torch.stack(chain))
    torch.testing.assert_close(sweep(model, x, states, 3)[:3], torch.stack(chain[:3]))
    assert not torch.allclose(sweep(model, x, states, 1)[3:], torch.stack(chain[3:]))


def test_only_the_last_sweep_carries_a_gradient() -> None:
    """With the states before it held fixed, one sweep more has the same gradient as that sweep alone."""
    model, (x, _) = _model("gru"), _batch()
    states = _tree_states(model, x)
    consistency_loss(model, x, states, 3).backward()
    whole = _gradients(model)
    model.zero_grad()
    twice = torch.cat([states[:1], sweep(model, x, states, 2).detach()])
    last = model.cells[0](twice[:-1], model.blocks(x, 0)[:-1])
    (0.5 * ((last - states[1:]) ** 2).sum() / len(x)).backward()
    torch.testing.assert_close(_gradients(model), whole)


def test_the_ladder_reads_every_input_once() -> None:
    model, (x, _) = _model("gru"), _batch()
    first, second, third = model.climb(x)
    h4 = model.cells[2](model.start(x), x[:, :4].flatten(1))
    torch.testing.assert_close(first, model.head(model.cells[2](h4, x[:, 4:].flatten(1))))
    h6 = model.cells[1](h4, x[:, 4:6].flatten(1))
    torch.testing.assert_close(second, model.head(model.cells[1](h6, x[:, 6:].flatten(1))))
    h7 = model.cells[0](h6, x[:, 6])
    torch.testing.assert_close(third, model.head(model.cells[0](h7, x[:, 7])))


def test_the_written_out_gru_is_torchs() -> None:
    fused, cell = FusedGru(inputs=2, width=6, classes=4, seed=0), GruCell(2, 6, torch.Generator())
    with torch.no_grad():
        for ours, theirs in (
            (cell.input_weight, fused.gru.weight_ih_l0.T),
            (cell.state_weight, fused.gru.weight_hh_l0.T),
            (cell.input_bias, fused.gru.bias_ih_l0),
            (cell.state_bias, fused.gru.bias_hh_l0),
        ):
            ours.copy_(theirs)
    x, _ = _batch()
    torch.testing.assert_close(fused.head(roll(cell, torch.zeros(5, 6), x.transpose(0, 1))), fused.roll(x))


def test_backpropagation_through_time_reaches_the_first_step() -> None:
    model, (x, y) = ChainRnn("elman", 2, 6, 4, seed=0), _batch()
    x.requires_grad_()
    bptt_step(model, x, y)
    assert x.grad is not None
    assert (x.grad.abs().sum(dim=(0, 2)) > 0).all()


def test_cells_of_equal_seeds_begin_equal_and_others_do_not() -> None:
    chain, tree, other = ChainRnn("gru", 2, 6, 4, seed=1), _model("gru", seed=1), _model("gru", seed=2)
    assert torch.equal(chain.cells[0].input_weight, tree.cells[0].input_weight)
    assert not torch.equal(other.cells[0].input_weight, tree.cells[0].input_weight)
    assert isinstance(_model("elman").cells[0], ElmanCell)


def test_pixels_keep_their_order_or_take_the_permutations() -> None:
    images = torch.arange(12.0).reshape(1, 3, 4)
    assert as_sequence(images, 8)[0].flatten().tolist() == [*range(12), 0, 0, 0, 0]
    permutation = torch.arange(11, -1, -1)
    assert as_sequence(images, 4, permutation)[0].tolist() == [[11, 10, 9], [8, 7, 6], [5, 4, 3], [2, 1, 0]]
