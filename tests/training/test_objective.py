from __future__ import annotations

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from family.tree import Tree
from tests.conftest import SMALL_VIT
from training.config import MlpConfig, ModelConfig, ResMlpConfig, VitConfig
from training.distributed import Team
from training.model import Family, build_family
from training.objective import (
    CONTRAST_TEMPERATURE,
    chain_step,
    chains_step,
    contrastive_loss,
    contrastive_step,
    hbll_probability,
    hbll_step,
    ladder_step,
    path_step,
    sample_chain,
    sample_chains,
    sample_path,
)

MODELS = [
    SMALL_VIT,
    MlpConfig(hierarchy_depth=3, width=12),
    ResMlpConfig(hierarchy_depth=3, width=12, hidden=16),
    VitConfig(hierarchy_depth=2, patch=14, width=8, hidden=8),
]


@pytest.fixture(params=MODELS, ids=["vit", "mlp", "resmlp", "vit-d2"])
def family(request: pytest.FixtureRequest) -> Family:
    return build_family(request.param, seed=3)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(6, 28, 28, generator=generator), torch.randint(0, 10, (6,), generator=generator)


def _gradients(family: Family) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in family.named_parameters() if p.grad is not None}


def _node_by_node(
    family: Family, x: Tensor, y: Tensor, nudge: float, only: int | None = None, summed: bool = False
) -> float:
    """Algorithm 1 without stacking, leaves or tricks: ordinary autograd, one node after the other.

    With `only`, just that node's loss is differentiated. `summed`: the latent loss is the squared norm (of a token), as in the paper.
    The sum of the losses is returned.
    """
    tree = family.tree
    weights = dict(family.blocks.named_parameters())

    def block(node: int, state: Tensor) -> Tensor:
        return family.blocks.run({name: w[node - 1] for name, w in weights.items()}, state)

    embedded = family.embed(x)
    states = {0: embedded.detach()}
    losses = {}
    for level in reversed(range(tree.hierarchy_depth)):
        for node in tree.level_nodes(level):
            left, right = tree.parents(node)
            a = block(node, embedded if node == tree.root else states[left])
            if right == tree.n:
                per_row = F.cross_entropy(family.head_at(node)(a), y, reduction="none")
            else:
                squares = (block(right, a) - states[right]).square()
                squares = squares.sum(dim=-1) if summed else squares.mean(dim=-1)
                per_row = squares.reshape(len(y), -1).mean(dim=1)
            losses[node] = per_row.mean()
            (gradient,) = torch.autograd.grad(per_row.sum(), a, retain_graph=True)
            states[node] = (a - nudge * gradient).detach()
    total = sum(losses.values()) if only is None else losses[only]
    assert isinstance(total, Tensor)
    total.backward()
    return sum(loss.item() for loss in losses.values())


@pytest.mark.parametrize("nudge", [0.0, 0.5, 2.0])
def test_level_batched_step_equals_node_by_node(family: Family, batch: tuple[Tensor, Tensor], nudge: float) -> None:
    plain = copy.deepcopy(family)
    expected = _node_by_node(plain, *batch, nudge)
    step = hbll_step(family, *batch, nudge=nudge, noise=0, generator=torch.Generator())
    assert step.loss.item() == pytest.approx(expected, abs=1e-5)
    got, wanted = _gradients(family), _gradients(plain)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("depth", [2, 4, 5])
@pytest.mark.parametrize("config", MODELS[:3], ids=["vit", "mlp", "resmlp"])
def test_all_depths_and_ways_to_cut_a_level_equal_node_by_node(
    config: ModelConfig, depth: int, batch: tuple[Tensor, Tensor]
) -> None:
    plain = build_family(config.model_copy(update={"hierarchy_depth": depth}), seed=3)
    families = {at_once: copy.deepcopy(plain) for at_once in (None, 1, 3)}
    expected = _node_by_node(plain, *batch, nudge=0.5)
    wanted = _gradients(plain)
    for at_once, family in families.items():
        step = hbll_step(family, *batch, nudge=0.5, noise=0, generator=torch.Generator(), at_once=at_once)
        assert step.loss.item() == pytest.approx(expected, abs=1e-5)
        got = _gradients(family)
        assert got.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


def test_the_published_step_sums_over_features(family: Family, batch: tuple[Tensor, Tensor]) -> None:
    """Eqs. 10, 11 and 30 with c = 1/4. Sums are large: the tolerance is relative to the greatest gradient."""
    plain = copy.deepcopy(family)
    expected = _node_by_node(plain, *batch, nudge=0.25, summed=True)
    step = hbll_step(family, *batch, nudge=0.25, noise=0, generator=torch.Generator(), over_features="sum")
    assert step.loss.item() == pytest.approx(expected, rel=1e-5)
    got, wanted = _gradients(family), _gradients(plain)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5 * gradient.abs().max().item() + 1e-7, rtol=1e-4)


@pytest.mark.parametrize("config", MODELS[:3], ids=["vit", "mlp", "resmlp"])
def test_a_nodes_loss_reaches_no_block_but_its_own_and_its_right_parents(
    config: ModelConfig, batch: tuple[Tensor, Tensor]
) -> None:
    """The locality of HBLL. Together with the tests above this holds for the level-batched step too."""
    for node in Tree(3).nodes:
        family = build_family(config, seed=3)
        _node_by_node(family, *batch, nudge=0.5, only=node)
        allowed = {node, family.tree.parents(node)[1]}
        for name, parameter in family.blocks.named_parameters():
            assert parameter.grad is not None
            reached = {index + 1 for index, part in enumerate(parameter.grad) if part.abs().max() > 0}
            assert reached <= allowed, f"{name} of blocks {reached - allowed} is trained by node {node}"
        head_is_trained = any(p.grad is not None for p in family.head.parameters())
        assert head_is_trained == (family.tree.parents(node)[1] == family.tree.n)


@pytest.mark.parametrize("config", MODELS[:3], ids=["vit", "mlp", "resmlp"])
def test_the_step_keeps_gradients_local_even_if_a_distant_block_breaks(
    config: ModelConfig, batch: tuple[Tensor, Tensor]
) -> None:
    """In the batched step itself: NaN in block 1 reaches no gradient but those of node 1 and its right parent 2."""
    family = build_family(config, seed=3)
    with torch.no_grad():
        for parameter in family.blocks.parameters():
            parameter[0] = float("nan")
    hbll_step(family, *batch, nudge=0.5, noise=0, generator=torch.Generator())
    broken = {
        index + 1
        for parameter in family.blocks.parameters()
        for index, part in enumerate(parameter.grad)
        if part.isnan().any()
    }
    assert broken == {1, 2}
    assert not any(p.grad.isnan().any() for part in (family.embed, family.head) for p in part.parameters())


def test_embedding_is_trained_by_the_root_alone(batch: tuple[Tensor, Tensor]) -> None:
    family, rooted = (build_family(SMALL_VIT, seed=3) for _ in range(2))
    hbll_step(family, *batch, nudge=0.5, noise=0, generator=torch.Generator())
    path_step(rooted, (4,), *batch)
    for ours, roots in zip(family.embed.parameters(), rooted.embed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, roots.grad)


def test_noise_comes_from_the_generator_alone(batch: tuple[Tensor, Tensor]) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        family = build_family(SMALL_VIT, seed=3)
        hbll_step(family, *batch, nudge=0.5, noise=0.1, generator=torch.Generator().manual_seed(seed))
        return _gradients(family)

    once, again, other = run(1), run(1), run(2)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert any(not torch.equal(once[name], other[name]) for name in once)


@pytest.mark.parametrize("path", [(4,), (4, 6, 7), (2, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7)])
def test_chain_step_is_backpropagation_with_exits(batch: tuple[Tensor, Tensor], path: tuple[int, ...]) -> None:
    x, y = batch
    family, plain = (build_family(SMALL_VIT, seed=3) for _ in range(2))
    step = chain_step(family, path, x, y)
    weights = dict(plain.blocks.named_parameters())
    state, exits = plain.embed(x), []
    for node in path:
        state = plain.blocks.run({name: w[node - 1] for name, w in weights.items()}, state)
        if node in (4, 6, 7):
            exits.append(plain.head_at(node)(state))
    deepest = exits.pop()
    loss = F.cross_entropy(deepest, y)
    p = deepest.detach().softmax(dim=1)
    for q in exits:
        kl = (p * (p.log() - q.log_softmax(dim=1))).sum(dim=1).mean()
        loss = loss + 0.5 * F.cross_entropy(q, y) + 0.5 * kl
    loss.backward()
    assert step.evaluations == len(path) * len(y)
    assert step.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    got = _gradients(family)
    for name, gradient in _gradients(plain).items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


class Repeated(nn.Module):
    """So many answers to each row, one after another: as of a GPT, which has a label for each position."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, logits: Tensor) -> Tensor:
        return logits.repeat_interleave(self.times, dim=0)


@pytest.mark.parametrize("labels", [1, 3])
def test_several_chains_each_train_on_their_rows(labels: int) -> None:
    """And two ranks, each with its half of the batch, find the halves of the same gradient."""
    rng = torch.Generator().manual_seed(5)
    rows = 12 // labels
    x, y = torch.rand(rows, 28, 28, generator=rng), torch.randint(10, (12,), generator=rng)
    whole, parts, *ranks = (build_family(SMALL_VIT, seed=3) for _ in range(4))
    for family in (whole, parts, *ranks):
        family.head = nn.ModuleDict({node: nn.Sequential(head, Repeated(labels)) for node, head in family.head.items()})
    chains = [((4, 6, 7), slice(0, rows // 2)), ((4,), slice(rows // 2, rows - 1)), ((2, 4, 5), slice(rows - 1, rows))]
    step = chains_step(whole, chains, x, y)
    loss = 0.0
    for path, of_path in chains:
        part = x[of_path]
        family = copy.deepcopy(parts)
        family.zero_grad()
        loss += (
            chain_step(family, path, part, y[of_path.start * labels : of_path.stop * labels]).loss.item() * len(part) / rows
        )
        for parameter, of_part in zip(parts.parameters(), family.parameters(), strict=True):
            if of_part.grad is not None:
                weighted = of_part.grad * len(part) / rows
                parameter.grad = weighted if parameter.grad is None else parameter.grad + weighted
    assert step.loss.item() == pytest.approx(loss, abs=1e-5)
    assert step.evaluations == sum(len(path) * (of_path.stop - of_path.start) * labels for path, of_path in chains)
    for got, expected in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-6, rtol=1e-4)
    of_ranks = []
    for rank, family in enumerate(ranks):
        team = Team(rank, len(ranks))
        mine = team.rows(rows)
        of_labels = slice(mine.start * labels, mine.stop * labels)
        of_ranks.append(chains_step(family, chains, x[mine], y[of_labels], team=team))
    assert [each.evaluations for each in of_ranks] == [step.evaluations / 2] * 2
    assert sum(each.loss.item() for each in of_ranks) / 2 == pytest.approx(step.loss.item(), abs=1e-5)
    for got, *both in zip(whole.parameters(), *(family.parameters() for family in ranks), strict=True):
        halves = [each.grad for each in both if each.grad is not None]
        assert bool(halves) == (got.grad is not None)
        if got.grad is not None:
            torch.testing.assert_close(sum(halves) / 2, got.grad, atol=1e-6, rtol=1e-4)


@given(st.integers(1, 9), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_of_several_chains_the_ladder_has_half_and_all_rows_have_one(count: int, rows: int, seed: int) -> None:
    tree = Tree(3)
    chains = sample_chains(tree, np.random.default_rng(seed), count, rows)
    assert len(chains) == count
    assert [row for _, of_path in chains for row in range(rows)[of_path]] == [*range(rows)]
    if count == 1:
        assert chains[0][0] == sample_chain(tree, np.random.default_rng(seed))
    else:
        assert chains[0] == (tree.ladder[-1], slice(0, rows // 2))
        sizes = [of_path.stop - of_path.start for _, of_path in chains[1:]]
        assert max(sizes) - min(sizes) <= 1


def test_gradients_add_up_over_steps(family: Family, batch: tuple[Tensor, Tensor]) -> None:
    path = family.tree.ladder[-1]
    path_step(family, path, *batch)
    once = _gradients(family)
    path_step(family, path, *batch)
    for name, gradient in _gradients(family).items():
        torch.testing.assert_close(gradient, 2 * once[name])


def _trained_blocks(family: Family) -> set[int]:
    """Nodes whose block got any gradient."""
    return {
        node
        for parameter in family.blocks.parameters()
        if parameter.grad is not None
        for node, part in enumerate(parameter.grad, 1)
        if part.abs().max() > 0
    }


@pytest.mark.parametrize("path", [(4,), (2, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7)])
def test_path_step_is_the_last_loss_alone(family: Family, batch: tuple[Tensor, Tensor], path: tuple[int, ...]) -> None:
    """Unlike a chain, whose exits teach too: where it passes an exit the gradients differ."""
    path = tuple(node for node in path if node < family.tree.n) if family.tree.n == 8 else (1, 2, 3)
    x, y = batch
    exits = copy.deepcopy(family)
    step = path_step(family, path, x, y)
    assert step.evaluations == len(path) * len(y)
    assert step.loss.item() == pytest.approx(F.cross_entropy(family(x, path), y).item(), abs=1e-6)
    assert _trained_blocks(family) == set(path)
    chain = chain_step(exits, path, x, y)
    passes_exits = sum(family.tree.is_hop(node, family.tree.n) for node in path) > 1
    assert (chain.loss.item() > step.loss.item() + 0.1) == passes_exits


def test_exits_train_the_ladder_with_equal_weights(family: Family, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    plain = copy.deepcopy(family)
    step = ladder_step(family, x, y)
    ladder = family.tree.ladder
    assert step.evaluations == len(ladder) * len(y)
    assert _trained_blocks(family) == set(ladder[-1])
    loss = sum(path_step(plain, path, x, y).loss.item() for path in ladder)  # gradients add up over the rungs
    assert step.loss.item() == pytest.approx(loss, abs=1e-5)
    for name, gradient in _gradients(plain).items():
        torch.testing.assert_close(_gradients(family)[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("margin", [0.0, 0.4, 2.0])
def test_contrastive_loss_is_its_formula(margin: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features, y = torch.randn(7, 5, generator=generator), torch.tensor([0, 1, 0, 2, 1, 1, 3])
    rows = []
    for i in range(7):
        logits = {}
        for j in set(range(7)) - {i}:
            s = float(features[i] @ features[j] / features[i].norm() / features[j].norm())
            logits[j] = (min(s + margin, 1.0) if y[i] == y[j] else s) / CONTRAST_TEMPERATURE
        total = math.log(sum(math.exp(value) for value in logits.values()))
        of_row = [total - logits[j] for j in logits if y[i] == y[j]]
        rows.append(sum(of_row) / len(of_row) if of_row else 0.0)
    assert contrastive_loss(features, y, margin).item() == pytest.approx(sum(rows) / 7, abs=1e-5)


def test_contrastive_loss_is_least_where_classes_lie_apart() -> None:
    y = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 3]])
    mixed = torch.tensor([[1.0, 0], [0, 2], [0, 1], [3, 0]])
    assert contrastive_loss(apart, y, 0.0) < 0.01 < contrastive_loss(mixed, y, 0.0)


def test_contrastive_layers_learn_from_their_own_loss_alone(family: Family, batch: tuple[Tensor, Tensor]) -> None:
    """Each block's gradient is that of its own loss with a constant input, the head's that of the label, and the embedding's
    that of the first block's loss: nothing comes back from deeper blocks."""
    x, y = batch
    path = family.tree.full
    plain = copy.deepcopy(family)
    step = contrastive_step(family, path, x, y)
    assert step.evaluations == len(path) * len(y)
    weights = dict(plain.blocks.named_parameters())
    state = plain.embed(x)
    for index, node in enumerate(path):
        state = plain.blocks.run({name: w[node - 1] for name, w in weights.items()}, state)
        features = state.mean(dim=1) if state.ndim == 3 else state
        own = contrastive_loss(features, y, 0.4 - 0.3 * index / (len(path) - 1))
        before = {name: w.grad[node - 1].clone() for name, w in weights.items() if w.grad is not None}
        own.backward()
        for name, gradient in before.items():
            assert not gradient.any(), f"{name} of block {node} was trained before its turn"
        state = state.detach()
    F.cross_entropy(plain.head_at(node)(state), y).backward()
    got, wanted = _gradients(family), _gradients(plain)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)
    assert _trained_blocks(family) == set(path)


def test_nothing_comes_back_from_a_deeper_contrastive_layer(batch: tuple[Tensor, Tensor]) -> None:
    """In the step itself: NaN in the last block reaches no gradient but its own and the head's."""
    family = build_family(SMALL_VIT, seed=3)
    with torch.no_grad():
        for parameter in family.blocks.parameters():
            parameter[6] = float("nan")
    contrastive_step(family, family.tree.full, *batch)
    for parameter in family.blocks.parameters():
        assert parameter.grad is not None
        assert parameter.grad[:6].isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in family.embed.parameters())
    assert any(p.grad is not None and p.grad.isnan().any() for p in family.head.parameters())


@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_sampled_chains_are_paths(hierarchy_depth: int, seed: int) -> None:
    tree = Tree(hierarchy_depth)
    path = sample_chain(tree, np.random.default_rng(seed))
    assert tree.validate(path) == path


def test_sampled_paths_are_uniform_over_depth() -> None:
    rng, tree = np.random.default_rng(0), Tree(3)
    counts = np.bincount([len(sample_path(tree, rng)) for _ in range(7000)], minlength=8)[1:]
    assert all(abs(count - 1000) < 120 for count in counts)


def test_sampling_is_half_ladder_and_uniform_over_depth() -> None:
    rng, tree = np.random.default_rng(0), Tree(3)
    paths = [sample_chain(tree, rng) for _ in range(7000)]
    others = [len(path) for path in paths if path != (4, 6, 7)]
    counts = np.bincount(others, minlength=8)[1:]
    assert abs(len(paths) - len(others) - (3500 + 100)) < 200  # the ladder is also one of the five paths of depth 3
    assert all(abs(count - 500) < 90 for depth, count in enumerate(counts, 1) if depth != 3)


def test_sampling_is_uniform_within_a_depth() -> None:
    rng, tree = np.random.default_rng(0), Tree(3)
    five = Counter(path for path in (sample_chain(tree, rng) for _ in range(14_000)) if len(path) == 5)
    assert len(five) == 6
    assert all(abs(count - 1000 / 6) < 60 for count in five.values())


def test_noise_has_the_papers_scale() -> None:
    """The posterior's standard deviation is sigma / sqrt(2): with a block that passes its state on, the child sees it."""
    family = build_family(MlpConfig(hierarchy_depth=2, width=4), seed=0)
    seen = []
    randn = torch.randn

    def recording(*shape: object, **options: object) -> Tensor:
        seen.append(randn(*shape, **options))
        return seen[-1]

    states = _children_input(family, noise=0.3, recording=recording)
    quiet = _children_input(family, noise=0.0, recording=recording)
    torch.testing.assert_close(states - quiet, 0.3 / 2**0.5 * seen[0][0])


def _children_input(family: Family, noise: float, recording: object) -> Tensor:
    """What the root's children would read: what is written into the states of node 2."""
    written = []
    new_empty = Tensor.new_empty

    def keeping(self: Tensor, *shape: object) -> Tensor:
        written.append(new_empty(self, *shape))
        return written[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", keeping)
        patch.setattr(torch, "randn", recording)
        x, y = torch.rand(5, 28, 28, generator=torch.Generator().manual_seed(1)), torch.arange(5)
        hbll_step(family, x, y, nudge=0.0, noise=noise, generator=torch.Generator().manual_seed(2))
    return written[0][2].clone()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_hbll_steps_take_their_share_of_the_work(share: float, batch: tuple[Tensor, Tensor]) -> None:
    family = build_family(SMALL_VIT, seed=0)
    step = hbll_step(family, *batch, nudge=0, noise=0, generator=torch.Generator())
    assert step.evaluations == 11 * len(batch[1])
    p = hbll_probability(family.tree, share)
    rng = np.random.default_rng(1)
    mean_chain = np.mean([len(sample_chain(family.tree, rng)) for _ in range(20_000)])
    assert 11 * p / (11 * p + mean_chain * (1 - p)) == pytest.approx(share, abs=0.01)
