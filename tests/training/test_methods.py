from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from family.tree import Tree
from tests.conftest import SMALL_VIT
from training.config import BUILT_IN, ConfigError, DigitsConfig, MethodName, ResMlpConfig, RunConfig, TrainConfig
from training.dataset import Dataset
from training.digits import load_digits
from training.methods import METHODS, Context, steps_of, trained_paths
from training.model import Family, build_family
from training.objective import Step, hbll_step
from training.trainer import Report, train

TREE = Tree(3)


@pytest.fixture(scope="module")
def centred() -> Dataset:
    return load_digits(0)


def _settings(name: MethodName, **changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"method": name, "blocks": 3 if name == "bp" else None} | changes)


def _context(settings: TrainConfig, family: Family, seed: int = 0) -> Context:
    return Context(settings, family, np.random.default_rng(seed), torch.Generator().manual_seed(seed))


def _gradients(family: Family) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in family.named_parameters() if p.grad is not None}


def test_every_name_that_a_configuration_knows_is_a_method() -> None:
    assert tuple(METHODS) == BUILT_IN


@pytest.mark.parametrize("name", METHODS)
def test_a_steps_cost_is_as_foretold(name: MethodName) -> None:
    """On average over the random ones: budgets and epochs are computed with it."""
    family = build_family(ResMlpConfig(width=4, hidden=4), seed=0)
    settings, method = _settings(name), METHODS[name]
    context = _context(settings, family)
    x, y = torch.rand(4, 28, 28).repeat(method.views, 1, 1), torch.arange(4).repeat(method.views)
    costs = [method.step(context, x, y).evaluations / 4 for _ in range(200)]
    foretold = method.evaluations(settings, TREE)
    error = np.std(costs) / len(costs) ** 0.5
    assert abs(np.mean(costs) - foretold) <= 4 * error


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_exactly_the_blocks_of_its_paths(name: MethodName) -> None:
    family = build_family(SMALL_VIT, seed=0)
    config = RunConfig(model=SMALL_VIT, train=_settings(name))
    context = _context(config.train, family)
    for index in range(20):
        x, y = torch.rand(4, 28, 28, generator=torch.Generator().manual_seed(index)), torch.tensor([0, 1, 0, 1])
        METHODS[name].step(context, x, y)
    gradients = dict(family.blocks.named_parameters())["up_weight"].grad
    assert gradients is not None
    trained = {node for node, part in enumerate(gradients, 1) if part.abs().max() > 0}
    assert trained == {node for path in trained_paths(config, TREE, tuple(TREE.paths())) for node in path}


def test_methods_of_few_paths_are_scored_on_those() -> None:
    everything = tuple(TREE.paths())

    def scored(name: MethodName, **changes: object) -> tuple[tuple[int, ...], ...]:
        return trained_paths(RunConfig(train=_settings(name, **changes)), TREE, everything)

    assert scored("exits") == ((4,), (4, 6), (4, 6, 7))
    assert scored("cffm") == (TREE.full,)
    assert scored("cffm", blocks=2) == scored("bp", blocks=2) == ((4, 6),)
    assert scored("bp", blocks=7) == (TREE.full,)
    assert scored("paths") == scored("hbll-paper") == everything


@pytest.mark.parametrize("nudge", [0.0, 0.5])
def test_hbll_paper_is_the_published_step_whatever_hblls_own_settings(nudge: float) -> None:
    x, y = torch.rand(6, 28, 28, generator=torch.Generator().manual_seed(1)), torch.arange(6)
    by_name, published = (build_family(SMALL_VIT, seed=2) for _ in range(2))
    METHODS["hbll-paper"].step(_context(_settings("hbll-paper", nudge=nudge, noise=0.1), by_name, seed=7), x, y)
    hbll_step(published, x, y, nudge=0.25, noise=0.1, generator=torch.Generator().manual_seed(7), over_features="sum")
    for name, gradient in _gradients(published).items():
        assert torch.equal(_gradients(by_name)[name], gradient), name


@pytest.mark.parametrize("exit_heads", [True, False])
def test_local_steps_mixed_with_chains_train_the_head_only_where_all_paths_share_it(exit_heads: bool) -> None:
    x, y = torch.rand(6, 28, 28, generator=torch.Generator().manual_seed(1)), torch.arange(6)
    model = SMALL_VIT.model_copy(update={"exit_heads": exit_heads})
    mixed, local = (build_family(model, seed=2) for _ in range(2))
    settings = _settings("hbll+chains", hbll_share=1 - 1e-9)
    METHODS["hbll+chains"].step(_context(settings, mixed), x, y)
    METHODS["hbll"].step(_context(settings, local), x, y)
    for name, gradient in _gradients(local).items():
        is_left_alone = exit_heads and name.startswith("head.")
        assert gradient.any()
        assert torch.equal(_gradients(mixed)[name], torch.zeros_like(gradient) if is_left_alone else gradient), name


def test_local_steps_alone_train_every_head() -> None:
    x, y = torch.rand(6, 28, 28, generator=torch.Generator().manual_seed(1)), torch.arange(6)
    family = build_family(SMALL_VIT, seed=2)
    METHODS["hbll+chains"].step(_context(_settings("hbll+chains", hbll_share=1), family), x, y)
    assert all(p.grad is not None and p.grad.any() for p in family.head.parameters())


def test_heads_of_exits_begin_as_one_and_are_trained_apart() -> None:
    family = build_family(SMALL_VIT, seed=0)
    one = build_family(SMALL_VIT.model_copy(update={"exit_heads": False}), seed=0)
    for node in family.tree.exits:
        for name, weight in one.head.state_dict().items():
            assert torch.equal(family.head_at(node).state_dict()[name], weight)
    x, y = torch.rand(4, 28, 28), torch.arange(4)
    METHODS["bp"].step(_context(_settings("bp", blocks=1), family), x, y)
    trained = {node for node in family.tree.exits if any(p.grad is not None for p in family.head_at(node).parameters())}
    assert trained == {4}


def test_steps_are_counted_as_the_trainer_takes_them(tmp_path: Path, centred: Dataset) -> None:
    for name in ("exits", "cffm", "bp", "hbll"):
        config = RunConfig(
            model=ResMlpConfig(width=4, hidden=4), train=_settings(name, budget=2.5, batch=100, evaluations=1)
        )
        steps: list[int] = []
        train(config, tmp_path / name, centred, lambda report, steps=steps: steps.append(report.step))
        assert len(steps) == steps_of(config, TREE, len(centred.train)), name


def test_views_of_an_image_are_shifted_apart_and_keep_its_label(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []

    def keep(context: Context, x: torch.Tensor, y: torch.Tensor) -> Step:
        batches.append((x, y))
        return METHODS["bp"].step(context, x, y)

    monkeypatch.setitem(METHODS, "cffm", replace(METHODS["cffm"], step=keep))
    settings = _settings("cffm", blocks=1, batch=50, budget=0.03, evaluations=1)
    train(RunConfig(model=ResMlpConfig(width=4), train=settings), tmp_path, digits, lambda _: None)
    (x, y), *_ = batches
    assert (len(x), len(y)) == (100, 100)
    assert torch.equal(y[:50], y[50:])
    apart = (x[:50] != x[50:]).flatten(1).any(dim=1)
    assert apart.float().mean() > 0.9  # one in 81 gets the same shift twice
    assert torch.allclose(x[:50].sum(dim=(1, 2)), x[50:].sum(dim=(1, 2)), rtol=0.2)


@pytest.mark.parametrize(
    ("name", "budget", "least"),
    [("paths", 24, 0.6), ("exits", 12, 0.6), ("cffm", 84, 0.6), ("hbll-paper", 44, 0.5)],
)
def test_every_new_method_learns(tmp_path: Path, centred: Dataset, name: MethodName, budget: float, least: float) -> None:
    """A residual family, centred digits and a few seconds: far above chance on every path that the method trains."""
    reports: list[Report] = []
    settings = _settings(name, budget=budget, lr=3e-3, batch=64, evaluations=3)
    config = RunConfig(model=ResMlpConfig(width=32, hidden=32), data=DigitsConfig(shift=0), train=settings)
    train(config, tmp_path / "run", centred, reports.append)
    validations = [report.scores for report in reports if report.scores]
    first, last = validations[0], validations[-1]
    assert min(score.accuracy for score in last.values()) > least
    assert sum(score.loss for score in last.values()) < sum(score.loss for score in first.values())


@pytest.mark.parametrize(
    ("paths", "message"),
    [([(1, 2, 3, 5, 7)], r"the paths of method my:own: path 1-2-3-5-7: 3 -> 5 is no hop"), ([], "expected at least one")],
)
def test_paths_that_a_tree_does_not_have_are_refused_before_a_run_begins(
    tmp_path: Path, centred: Dataset, monkeypatch: pytest.MonkeyPatch, paths: list[tuple[int, ...]], message: str
) -> None:
    """Bug found: the run trained for its time, and its report ended with a KeyError."""
    monkeypatch.setitem(METHODS, "my:own", replace(METHODS["exits"], paths=lambda _settings, _tree: tuple(paths)))
    config = RunConfig(model=ResMlpConfig(width=4, hidden=4), train=TrainConfig(method="my:own"))
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run", centred, lambda _: None)
    assert not (tmp_path / "run").exists()
