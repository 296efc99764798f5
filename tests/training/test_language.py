from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from training import evaluate
from training.config import ConfigError, RunConfig, TrainConfig, VitConfig
from training.dataset import DataSpec
from training.digits import DIGITS
from training.evaluate import PathScore
from training.experiments import language
from training.language import CausalBlocks, GptConfig, build_gpt, build_windows
from training.methods import METHODS, Context
from training.model import Family, build_family
from training.objective import hbll_step
from training.text import Corpus, Tokens

SMALL = GptConfig(hierarchy_depth=3, context=8, width=8, heads=2)
BOTH = pytest.mark.parametrize("config", [SMALL, SMALL.model_copy(update={"positions": True})], ids=["alibi", "learned"])


def _batch(windows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (windows, SMALL.context + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].flatten()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """With matrices this small, threads do nothing but wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@BOTH
def test_a_prediction_depends_on_no_token_that_comes_after(config: GptConfig) -> None:
    family, (x, _) = build_gpt(config, 11, seed=0), _batch()
    before = family(x, family.tree.full).unflatten(0, (3, 8))
    for position in range(1, 8):
        changed = x.clone()
        changed[:, position:] = (changed[:, position:] + 1) % 11
        after = family(changed, family.tree.full).unflatten(0, (3, 8))
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(after[:, position], before[:, position])


@BOTH
def test_windows_of_a_batch_do_not_see_each_other(config: GptConfig) -> None:
    family, (x, _) = build_gpt(config, 11, seed=0), _batch()
    together = family(x, (4, 6))
    alone = torch.cat([family(x[i : i + 1], (4, 6)) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


SPEC = DataSpec(description="text", input_shape=(8,), labels=tuple("abcdefghijk"), vocabulary=11)


@BOTH
def test_the_family_that_is_served_predicts_what_follows_each_window(config: GptConfig) -> None:
    trained, (x, _) = build_gpt(config, 11, seed=0), _batch()
    served = build_windows(config, SPEC, seed=1)
    served.load_state_dict(trained.state_dict())
    for path in trained.tree.paths():
        last = trained(x, path).unflatten(0, (3, 8))[:, -1]
        torch.testing.assert_close(served(x, path), last, rtol=1e-5, atol=1e-6)


def test_models_of_text_and_of_numbers_take_no_others_rows() -> None:
    with pytest.raises(ConfigError, match=r"takes windows of 8 tokens .*got rows of \[28, 28\] of digits"):
        build_family(SMALL, 0, DIGITS)
    with pytest.raises(ConfigError, match=r"got rows of \[9\]"):
        build_family(SMALL, 0, SPEC.model_copy(update={"input_shape": (9,)}))
    for config in (VitConfig(), RunConfig.model_validate({"model": {"kind": "mlp"}}).model):
        with pytest.raises(ValueError, match=r"takes square images|rows of tokens have no mean"):
            build_family(config, 0, SPEC)


@BOTH
def test_the_order_of_earlier_tokens_matters(config: GptConfig) -> None:
    family = build_gpt(config, 11, seed=0)
    x = torch.arange(8)[None]
    swapped = x[:, [1, 0, *range(2, 8)]]
    assert not torch.allclose(family(x, (4,))[-1], family(swapped, (4,))[-1], atol=1e-6)


def test_stacked_blocks_are_the_single_ones() -> None:
    blocks = build_gpt(SMALL, 11, seed=0).blocks
    assert isinstance(blocks, CausalBlocks)
    states = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    stacked = blocks.run(blocks.of(range(2, 8, 4)), states)
    torch.testing.assert_close(stacked, torch.stack([blocks.at(2, states[0]), blocks.at(6, states[1])]))


def _node_by_node(family: Family, x: Tensor, y: Tensor) -> Tensor:
    """The loss of an HBLL step without nudge, by its definition; a mean over positions and features."""
    states, total = {0: family.embed(x).detach()}, torch.zeros(())
    for level in reversed(range(3)):
        for node in family.tree.level_nodes(level):
            left, right = family.tree.parents(node)
            start = family.embed(x) if node == family.tree.root else states[left]
            a = family.blocks.at(node, start)
            if right == family.tree.n:
                total = total + torch.nn.functional.cross_entropy(family.head(a), y)
            else:
                total = total + ((family.blocks.at(right, a) - states[right]) ** 2).mean()
            states[node] = a.detach()
    return total


def test_an_hbll_step_on_text_is_the_definition_node_by_node() -> None:
    (x, y), batched, single = _batch(), build_gpt(SMALL, 11, seed=0), build_gpt(SMALL, 11, seed=0)
    step = hbll_step(batched, x, y, nudge=0.0, noise=0.0, generator=torch.Generator())
    loss = _node_by_node(single, x, y)
    loss.backward()
    torch.testing.assert_close(step.loss, loss.detach(), rtol=1e-5, atol=1e-6)
    expected = {name: p.grad for name, p in single.named_parameters()}
    for name, parameter in batched.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["hbll", "hbll+chains", "bp"])
def test_a_family_learns_a_text_that_repeats(name: str) -> None:
    family = build_gpt(SMALL, 11, seed=0)
    settings = TrainConfig(method=name, nudge=0.0, blocks=7 if name == "bp" else None)
    optimizer = torch.optim.AdamW(family.parameters(), lr=0.01)
    text, rng, generator = torch.arange(400) % 5, np.random.default_rng(0), torch.Generator().manual_seed(0)
    for _ in range(60):
        start = torch.from_numpy(rng.integers(0, 300, 8))
        windows = text[start[:, None] + torch.arange(9)]
        optimizer.zero_grad(set_to_none=False)
        METHODS[name].step(Context(settings, family, rng, generator), windows[:, :-1], windows[:, 1:].flatten())
        optimizer.step()
    logits = family(text[None, :8], family.tree.full)
    assert (logits.argmax(dim=1) == text[1:9]).all()


def test_scores_are_the_same_however_few_windows_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large vocabulary the logits of a few windows are gigabytes."""
    family = build_gpt(SMALL, 11, seed=0)
    test = Tokens(torch.randint(11, (150,), generator=torch.Generator().manual_seed(0)), 1.0)
    corpus, paths = Corpus(tuple("abcdefghijk"), test, test, test), tuple(family.tree.paths())
    expected, sizes = language.score_windows(family, corpus, paths), []

    def score(logits: Tensor, labels: Tensor) -> PathScore:
        sizes.append(logits.numel())
        return evaluate.score(logits, labels)

    monkeypatch.setattr(language, "score", score)
    monkeypatch.setattr(language, "LOGITS_AT_ONCE", 300)  # three windows and a bit
    assert language.score_windows(family, corpus, paths) == pytest.approx(expected)
    assert max(sizes) == 3 * 8 * 11
    monkeypatch.setattr(language, "LOGITS_AT_ONCE", 1)
    assert language.score_windows(family, corpus, paths) == pytest.approx(expected)
