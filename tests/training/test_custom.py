"""Families of modules that are not ours."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from hbll.cli import main
from training.checkpoint import load_family, load_run_config
from training.config import ConfigError, CustomConfig, MethodName, ResMlpConfig, RunConfig, TrainConfig, parse_config
from training.custom import import_factory, import_method, load_trained, train_family
from training.dataset import Dataset, DataSpec
from training.digits import DIGITS
from training.methods import METHODS, Context
from training.model import Family, Standardise, build_family
from training.objective import hbll_step
from training.shapes import ShapeError, shapes_of
from training.trainer import Report, train


class Block(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout))

    def forward(self, state: Tensor) -> Tensor:
        return state + self.net(state)


def small(count: int = 3, features: int = 4, width: int = 6, classes: int = 3, dropout: float = 0.0) -> Family:
    torch.manual_seed(0)
    return Family(nn.Linear(features, width), [Block(width, dropout) for _ in range(count)], nn.Linear(width, classes))


def test_modules_one_by_one_learn_what_the_stack_learns_level_by_level() -> None:
    """The same weights, the same batch: equal losses and gradients."""
    stacked = build_family(ResMlpConfig(hierarchy_depth=3, width=12, hidden=10), seed=1)
    modules = [stacked.blocks.module(node) for node in stacked.tree.nodes]
    separate = Family(copy.deepcopy(stacked.embed), modules, copy.deepcopy(stacked.head))
    x, y = torch.rand(8, 28, 28), torch.arange(8)
    losses = []
    for family in (stacked, separate):
        generator = torch.Generator().manual_seed(2)
        losses.append(hbll_step(family, x, y, nudge=0.5, noise=0.1, generator=generator).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, parameter in stacked.blocks.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        for node, module in zip(stacked.tree.nodes, modules, strict=True):
            torch.testing.assert_close(parameter.grad[node - 1], module.get_parameter(name).grad, atol=1e-5, rtol=0)
    for mine, theirs in zip(stacked.embed.parameters(), separate.embed.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_any_modules(name: MethodName) -> None:
    family = small(dropout=0.1)
    settings = TrainConfig(method=name, blocks=2 if name in ("bp", "cffm") else None)
    x, y = torch.rand(12, 4), torch.arange(12) % 3
    context = Context(settings, family, np.random.default_rng(0), torch.Generator())
    step = METHODS[name].step(context, x, y)
    assert step.loss.isfinite()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in family.blocks.parameters())


def test_gradients_of_a_local_step_stay_in_two_blocks() -> None:
    """What node 1 implies about node 2 reaches no further: of a tree of three, node 3's block learns from the head alone."""
    family = small()
    seen: dict[int, int] = dict.fromkeys((1, 2, 3), 0)
    for node in seen:
        first = next(family.blocks.module(node).parameters())
        first.register_hook(lambda grad, node=node: seen.__setitem__(node, seen[node] + 1))
    hbll_step(family, torch.rand(5, 4), torch.arange(5) % 3, nudge=0, noise=0, generator=torch.Generator())
    assert seen == {1: 1, 2: 2, 3: 1}  # each for its own node's loss, and 2 once more as the right parent of 1


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([Block(6), Block(6)], r"2\*\*D - 1 blocks .* got 2"),
        ([], "got 0"),
        ([Block(6)] * 3, r"blocks.nodes.2.net.0.weight is the same parameter as blocks.nodes.1.net.0.weight"),
        ([nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))], "blocks.nodes.1.1 is a BatchNorm1d.*Use LayerNorm"),
    ],
    ids=["two", "none", "shared", "batch-norm"],
)
def test_blocks_that_make_no_family_are_refused(blocks: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Family(nn.Linear(4, 6), blocks, nn.Linear(6, 3))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_there_is_a_head_for_all_exits_or_one_for_each(count: int) -> None:
    with pytest.raises(ValueError, match=f"a family of 3 blocks has one head or 2, got {count}"):
        Family(nn.Linear(4, 6), [Block(6) for _ in range(3)], [nn.Linear(6, 3) for _ in range(count)])


def test_a_path_is_answered_by_the_head_where_it_ends() -> None:
    blocks = [Block(6) for _ in range(7)]
    family = Family(nn.Linear(4, 6), blocks, [nn.Linear(6, 3) for _ in range(3)])
    x = torch.rand(5, 4)
    for path in family.tree.paths():
        state = family.embed(x)
        for node in path:
            state = blocks[node - 1](state)
        head = family.get_submodule(f"head.{path[-1]}")
        torch.testing.assert_close(family(x, path), head(state))


def test_batch_norm_may_be_in_the_embedding() -> None:
    Family(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), [Block(6)], nn.Linear(6, 3))


def test_a_chain_of_one_row_is_too_short_for_batch_norm(tmp_path: Path, blobs: Dataset) -> None:
    """Bug found: torch's own words for it, without the setting that makes it so."""
    family = Family(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), [Block(6) for _ in range(3)], nn.Linear(6, 3))
    with pytest.raises(ConfigError, match=r"needs two rows.*of train.batch 6 each of train.chains 4 gets a share"):
        train_family(family, blobs, tmp_path, method="chains", budget=1, batch=6, chains=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: Family(f.embed, [Block(6), nn.Linear(6, 5), Block(6)], f.head),
         r"the block of node 2: expected a state of shape \[2, 6\], like the one that it reads, got \[2, 5\]"),
        (lambda f: Family(f.embed, [Block(6), Block(6), Block(7)], f.head),
         r"the block of node 3 fails on an input of shape \[2, 6\]"),
        (lambda f: Family(nn.Linear(5, 6), [Block(6)], f.head), r"the embedding fails on an input of shape \[2, 4\]"),
        (lambda f: Family(f.embed, [Block(6)], nn.Unflatten(1, (2, 3))),
         r"the head: expected logits of shape \[2, classes\], got \[2, 2, 3\]"),
        (lambda f: Family(f.embed, [Block(6)], [nn.Unflatten(1, (2, 3))]),
         r"the head of node 1: expected logits of shape \[2, classes\], got \[2, 2, 3\]"),
        (lambda f: Family(f.embed, [Block(6) for _ in range(3)], [nn.Linear(6, 3), nn.Linear(6, 4)]),
         r"the heads: expected as many logits of each, got by nodes \{2: 3, 3: 4\}"),
        (lambda f: Family(f.embed, [nn.LSTM(6, 6)], f.head), r"the block of node 1: expected a float32 tensor, got tuple"),
    ],
    ids=["shape", "fails", "embed", "head", "one of the heads", "heads", "tuple"],
)  # fmt: skip
def test_a_module_that_does_not_fit_is_named_with_its_shapes(change: Callable[[Family], Family], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        shapes_of(change(small()), torch.rand(2, 4))


def test_shapes_are_checked_before_anything_is_written(tmp_path: Path, blobs: Dataset) -> None:
    with pytest.raises(ShapeError, match=r"node 1"):
        train_family(Family(nn.Linear(4, 6), [nn.Linear(6, 5)], nn.Linear(6, 3)), blobs, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"the head gives 5 logits, and arrays blobs.npz has 3 classes"):
        train_family(small(classes=5), blobs, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train.lr: Input should be greater than 0"):
        train_family(small(), blobs, tmp_path / "run", lr=-1)
    assert not (tmp_path / "run").exists()


def test_training_with_dropout_is_repeated_exactly_and_loads_again(tmp_path: Path, blobs: Dataset) -> None:
    settings = {"budget": 4, "batch": 16, "evaluations": 1}
    a, b = (train_family(small(dropout=0.3), blobs, tmp_path / name, **settings) for name in "ab")
    for name, tensor in a.family.state_dict().items():
        assert torch.equal(tensor, b.family.state_dict()[name]), name
    again = load_trained(tmp_path / "a", lambda _: small(dropout=0.3))
    x = blobs.test.x
    assert torch.equal(again.family(x, (2,)), a.family(x, (2,)))
    assert (again.config, again.progress) == (a.config, a.progress)


def test_a_family_that_comes_ready_for_evaluation_is_trained_with_its_dropout(tmp_path: Path, blobs: Dataset) -> None:
    """Bug found: until the first validation it was trained without."""
    settings = {"budget": 4, "batch": 16, "evaluations": 1}
    a = train_family(small(dropout=0.3), blobs, tmp_path / "a", **settings).family.state_dict()
    b = train_family(small(dropout=0.3).eval(), blobs, tmp_path / "b", **settings).family.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    """Stands for a kill between two steps."""


@pytest.mark.parametrize("method", [{"method": "chains"}, {"method": "bp", "blocks": 1}], ids=["chains", "bp"])
def test_what_is_frozen_or_never_visited_resumes_too(tmp_path: Path, blobs: Dataset, method: dict[str, object]) -> None:
    """A pretrained embedding that must not change, and blocks that no step has a gradient for."""

    def frozen() -> Family:
        family = small()
        family.embed.requires_grad_(False)
        return family

    raw = {"model": {"kind": "custom", "hierarchy_depth": 2}, "data": blobs.source.model_dump()}
    config = parse_config(raw | {"train": {"budget": 6, "batch": 16, "evaluations": 3, "lr": 1e-2, **method}}, "test")
    whole = train(config, tmp_path / "whole", blobs, lambda _: None, family=frozen())

    def kill(report: Report) -> None:
        if report.share > 0.5:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "killed", blobs, kill, family=frozen())
    resumed = train(config, tmp_path / "killed", blobs, lambda _: None, family=frozen(), resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
        assert torch.equal(tensor, frozen().state_dict()[name]) or not name.startswith("embed"), name
    assert not torch.equal(whole.state_dict()["head.weight"], frozen().state_dict()["head.weight"])


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "modules"])
@pytest.mark.parametrize("name", METHODS)
def test_whatever_is_frozen_stays_and_the_rest_learns(name: MethodName, stacked: bool) -> None:
    """Bug found: where a loss reached frozen parameters alone, `hbll`, `hbll+chains` and `cffm` ended in a traceback."""
    settings = TrainConfig(method=name, blocks=1 if name in ("bp", "cffm") else None, hbll_share=1)
    x, y = torch.rand(12, 4), torch.arange(12) % 3
    for frozen in (("embed", "blocks.nodes.2"), ("blocks.nodes.1", "blocks.nodes.3"), ("embed", "blocks", "head")):
        family = small()
        if stacked:
            spec = DIGITS.model_copy(update={"input_shape": (4,), "labels": ("a", "b", "c")})
            family = build_family(ResMlpConfig(hierarchy_depth=2, width=6, hidden=6), 0, spec)
        for each, parameter in family.named_parameters():
            parameter.requires_grad_(not each.startswith(frozen))
        context = Context(settings, family, np.random.default_rng(0), torch.Generator())
        assert METHODS[name].step(context, x, y).loss.isfinite()
        if not stacked:
            assert all(p.requires_grad or p.grad is None for p in family.parameters())


def test_transposed_parameters_learn_what_others_learn(tmp_path: Path, blobs: Dataset) -> None:
    """Bug found: AdamW's fused kernel gave each weight the update of another one."""

    def transposed() -> Family:
        family = small()
        for layer in family.blocks.modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
        return family

    settings = {"budget": 4, "batch": 16, "evaluations": 1, "lr": 1e-2, "warmup_steps": 0}
    plain = train_family(small(), blobs, tmp_path / "plain", **settings).family.state_dict()
    for name, tensor in train_family(transposed(), blobs, tmp_path / "transposed", **settings).family.state_dict().items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-5, rtol=1e-4)


def test_blocks_may_share_a_buffer(tmp_path: Path, blobs: Dataset) -> None:
    """Bug found: safetensors refuses tensors that share memory, so the first checkpoint ended the run."""

    def masked() -> Family:
        family, mask = small(), torch.ones(6)
        for node in family.tree.nodes:
            family.blocks.module(node).register_buffer("mask", mask)
        return family

    train_family(masked(), blobs, tmp_path / "run", budget=1, batch=16, evaluations=1)
    again = load_trained(tmp_path / "run", lambda _: masked())
    assert torch.equal(again.family.blocks.get_buffer("nodes.2.mask"), torch.ones(6))


def test_a_run_of_own_modules_is_not_rebuilt_without_them(tmp_path: Path, blobs: Dataset) -> None:
    train_family(small(), blobs, tmp_path / "run", budget=1, batch=16, evaluations=1)
    assert load_run_config(tmp_path / "run").model == CustomConfig(hierarchy_depth=2)
    with pytest.raises(ConfigError, match=r"built in Python.* name it: --factory MODULE:FUNCTION"):
        load_family(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model.hierarchy_depth is 2, and the factory gives a family of 3, 7 blocks"):
        load_family(tmp_path / "run", lambda _: small(count=7))


_FACTORY = """
from torch import nn
from training.model import Family, Standardise
open("imported", "w").close()
def build(spec):
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    return Family(nn.Sequential(Standardise(spec), nn.Linear(*spec.input_shape, 8)), blocks, nn.Linear(8, len(spec.labels)))
def wrong(spec):
    return nn.Linear(1, 1)
"""


def test_a_factory_runs_only_where_the_command_line_names_it(
    tmp_path: Path, blobs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "factory_of_a_test.py").write_text(_FACTORY)
    (tmp_path / "own.toml").write_text(
        '[model]\nkind = "custom"\nhierarchy_depth = 2\nfactory = "factory_of_a_test:build"\n'
        '[data]\nkind = "arrays"\nfile = "blobs.npz"\n[train]\nbudget = 2\nbatch = 16\nevaluations = 1\n'
    )
    arguments = ["train", "--config", "own.toml", "--out", "run"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert "name it: --factory factory_of_a_test:build" in refused.output
    assert not (tmp_path / "imported").exists()
    done = CliRunner().invoke(main, [*arguments, "--factory", "factory_of_a_test:build"])
    assert done.exit_code == 0, done.output
    for command in (["evaluate", "run"], ["export", "run", "bundle"]):
        refused = CliRunner().invoke(main, command)
        assert "name it: --factory factory_of_a_test:build" in refused.output
    done = CliRunner().invoke(main, ["evaluate", "run", "--factory", "factory_of_a_test:build"])
    assert done.exit_code == 0, done.output
    refused = CliRunner().invoke(main, ["train", "--dry-run", "--factory", "factory_of_a_test:build"])
    assert 'a factory goes with model.kind = "custom", and this model is a vit' in " ".join(refused.output.split())
    with pytest.raises(ConfigError, match=r"must return a training.model.Family, got Linear"):
        import_factory("factory_of_a_test:wrong")(DIGITS)


@pytest.mark.parametrize("name", ["no_such_module_here:build", "training.custom:nothing", "training.custom"])
def test_a_factory_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        import_factory(name)


@pytest.mark.parametrize("shape", [(5,), (3, 4, 4), (4, 4)])
def test_standardise_takes_away_the_mean_of_its_axis(shape: tuple[int, ...]) -> None:
    first = shape[0]
    normalisation = {"mean": list(range(first)), "std": [2.0] * first}
    spec = DataSpec(description="", input_shape=shape, labels=("a", "b"), normalisation=normalisation)
    x = torch.arange(first).float().reshape(-1, *[1] * (len(shape) - 1)).expand(2, *shape) + 2
    assert torch.equal(Standardise(spec)(x), torch.ones(2, *shape))


def test_a_configured_model_fits_itself_to_the_data() -> None:
    colour = DIGITS.model_copy(update={"input_shape": (3, 28, 28), "labels": ("a", "b")})
    vit = build_family(RunConfig().model, 0, colour)
    assert shapes_of(vit, torch.rand(2, 3, 28, 28)).classes == 2
    with pytest.raises(ConfigError, match=r"model.patch must divide the image side 30, got 7"):
        build_family(RunConfig().model, 0, DIGITS.model_copy(update={"input_shape": (30, 30)}))
    with pytest.raises(ConfigError, match=r"takes square images of 1 or 3 channels, got rows of \[13\]"):
        build_family(RunConfig().model, 0, DIGITS.model_copy(update={"input_shape": (13,)}))


MINE = """from training.methods import METHODS

mine = METHODS["exits"]
wrong = print
"""


def test_a_method_of_ones_own_is_imported_only_for_who_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "method_of_a_test.py").write_text(MINE)
    monkeypatch.setattr("sys.path", [*sys.path])
    name = "method_of_a_test:mine"
    tiny = ["--set", "model.kind=mlp", "--budget", "1", "--set", "train.evaluations=1"]
    refused = CliRunner().invoke(main, ["train", "--out", "run", "--set", f"train.method={name}", *tiny])
    assert f"name it: --method {name}" in " ".join(refused.output.split())
    assert "method_of_a_test" not in sys.modules
    try:
        done = CliRunner().invoke(main, ["train", "--out", "run", "--method", name, *tiny])
        assert done.exit_code == 0, done.output
        assert load_run_config(tmp_path / "run").train.method == name
        METHODS.pop(name)
        for command in (["evaluate", "run"], ["export", "run", "bundle"], ["train", "--resume", "--out", "run"]):
            refused = CliRunner().invoke(main, command)
            assert refused.exit_code == 1
            assert f"name it: --method {name}" in " ".join(refused.output.split()), command
        done = CliRunner().invoke(main, ["evaluate", "run", "--method", name])
        assert done.exit_code == 0, done.output
    finally:
        METHODS.pop(name, None)
    with pytest.raises(ConfigError, match=r"method_of_a_test:wrong must be a training.methods.Method, got builtin"):
        import_method("method_of_a_test:wrong")


def test_a_method_that_is_not_that_of_the_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug found: `evaluate` and `export` measured the run by its own method, without a word."""
    monkeypatch.setitem(METHODS, "my:mine", METHODS["exits"])
    monkeypatch.setattr("training.cli.import_method", METHODS.__getitem__)
    run = tmp_path / "run"
    tiny = ["--set", "model.kind=mlp", "--budget", "1", "--set", "train.evaluations=1"]
    assert CliRunner().invoke(main, ["train", "--out", str(run), "--method", "exits", *tiny]).exit_code == 0
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for command in (
        ["evaluate", str(run)],
        ["export", str(run), str(tmp_path / "1")],
        ["train", "--resume", "--out", str(run)],
    ):
        for name in ("paths", "bp", "my:mine"):
            refused = CliRunner().invoke(main, [*command, "--method", name])
            assert refused.exit_code == 1
            told = f"{run} was trained by method exits, not by {name}: give --method exits"
            assert told in " ".join(refused.output.split()), command
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == written
    named = CliRunner().invoke(main, ["evaluate", str(run), "--method", "exits"])
    assert named.exit_code == 0, named.output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic", "there is no method magic; there are hbll+chains, "),
        ("no_such_module_here:mine", "cannot import no_such_module_here:mine: No module named"),
        ("training.custom:nothing", "cannot import training.custom:nothing"),
        (":mine", "expected a method MODULE:NAME like my_methods:mine, got ':mine'"),
    ],
)
def test_a_method_that_is_not_there_is_named(name: str, message: str) -> None:
    for command in (["train", "--method", name], ["compare", "--methods", f"exits,{name}"]):
        refused = CliRunner().invoke(main, [*command, "--dry-run"])
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.split())
