"""Which rows run next, through which blocks, and which are answered: deterministic policies over plain data.

`wish` is what a request asks for, `state` what all policies speak of, `ladder_edf` our policy, `baselines` the published
ones that it is measured against, `scheduler` several models on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from family.tree import Path, format_path
from service.policy.baselines import Aimd, Cheapest, Clockwork, MaxAccuracy, MaxBatch, SlackFit, Static
from service.policy.ladder_edf import LadderEdf
from service.policy.state import Offer, Policy

DEFAULT_POLICY = "ladder-edf"

_PLAIN: dict[str, Callable[[Offer], Policy]] = {
    DEFAULT_POLICY: LadderEdf,
    "cheapest": Cheapest,
    "max-accuracy": MaxAccuracy,
    "max-batch": MaxBatch,
    "slackfit": SlackFit,
    "clockwork": Clockwork,
}
_OF_A_PATH: dict[str, Callable[[Offer, Path], Policy]] = {"static": Static, "aimd": Aimd}


def policy_names() -> list[str]:
    """How policies are named in settings; those of one path take it in brackets."""
    return [*_PLAIN, *(f"{name}(PATH)" for name in _OF_A_PATH)]


def check_policy_name(name: str) -> None:
    """Check the form; whether a model offers the path that it names is seen when the policy is made.

    Raises:
        ValueError: there is no such policy; the message lists what there is.
    """
    kind, bracket, rest = name.partition("(")
    if name not in _PLAIN and not (kind in _OF_A_PATH and bracket and rest.endswith(")")):
        raise ValueError(f"expected a policy of {', '.join(policy_names())}, got {name!r}")


def parse_policy(name: str, paths: Iterable[Path]) -> tuple[str, Path | None]:
    """The kind of a policy, and the path that it names, if it is one of `paths`.

    Raises:
        ValueError: there is no such policy, or no such path; the message lists what there is.
    """
    check_policy_name(name)
    if name in _PLAIN:
        return name, None
    kind, _, rest = name.partition("(")
    named = {format_path(path): path for path in paths}
    path = named.get(rest[:-1])
    if path is None:
        raise ValueError(f"{name}: the model offers the paths {', '.join(named)}")
    return kind, path


def make_policy(name: str, offer: Offer) -> Policy:
    """The policy of this name, `ladder-edf` or `static(4-6)`, for one model.

    Raises:
        ValueError: see `parse_policy`.
    """
    kind, path = parse_policy(name, offer.accuracies)
    return _PLAIN[kind](offer) if path is None else _OF_A_PATH[kind](offer, path)
