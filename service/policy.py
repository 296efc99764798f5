"""Which path a request gets: pure functions of what it wishes, the time left, and the latency profile.

No clock, no queue, no runtime. The rules:

- an explicit path or depth is obeyed exactly;
- with a confidence target a row *climbs*: the ladder's rungs, then the reference path if it is better than the last
  rung, until it is confident enough or the next segment would not finish within the budget;
- with a budget alone it gets the best path that fits into the time left, at the least the shallowest;
- without any wish it gets the reference path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from family.manifest import Manifest
from family.tree import Path, extends, format_path
from service.errors import InvalidInput, NotOffered
from service.profile import Segment

StoppedBy = Literal["depth", "path", "confidence", "budget", "complete"]
Depth = int | Literal["best", "full"]
Latency = Callable[[Segment, int], float]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks for, resolved against its model.

    `path` is an explicit path and `asked_as` the word it was asked by; at most one of `path` and `min_confidence`
    is given. `deadline_s` is on the monotonic clock.
    """

    path: Path | None = None
    asked_as: Literal["depth", "path"] = "path"
    min_confidence: float | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A whole path to run, and why the answer will have its depth."""

    path: Path
    stopped_by: StoppedBy


def resolve_path(manifest: Manifest, depth: Depth | None, path: str | None) -> tuple[Path | None, Literal["depth", "path"]]:
    """The explicit path that a request names by `depth` or by `path`, if any.

    Raises:
        InvalidInput: both are given, or the path is none of the tree's.
        NotOffered: the model does not offer it.
    """
    if depth is not None and path is not None:
        raise InvalidInput("give either depth or path, not both")
    if path is not None:
        try:
            nodes = manifest.tree.parse(path)
        except ValueError as exc:
            raise InvalidInput(str(exc)) from exc
        return _offered(manifest, nodes, f"path {path}"), "path"
    match depth:
        case None:
            return None, "path"
        case "best":
            return manifest.reference, "depth"
        case "full":
            return _offered(manifest, manifest.tree.full, "the full path"), "depth"
        case _:
            best = manifest.best_by_depth
            if depth not in best:
                raise NotOffered(
                    f"depth {depth} is not offered: expected one of {', '.join(map(str, best))}, best or full",
                    offered=list(best),
                )
            return best[depth], "depth"


def _offered(manifest: Manifest, nodes: Path, name: str) -> Path:
    offered = manifest.offered
    if nodes not in offered:
        raise NotOffered(f"{name} is not offered by this model", offered=[format_path(each) for each in offered])
    return nodes


def choose_target(manifest: Manifest, wish: Wish, slack_s: float | None, rows: int, latency: Latency) -> Target:
    """The path of a request that does not climb.

    `slack_s` is the time left (none: unlimited), `rows` the size of the batch it would run in.
    """
    if wish.path is not None:
        return Target(wish.path, wish.asked_as)
    front = manifest.front
    if slack_s is None:
        return Target(front[-1], "complete")
    fitting = [path for path in front if latency(Segment(path, embed=True), rows) <= slack_s]
    path = fitting[-1] if fitting else front[0]
    return Target(path, "complete" if path == front[-1] else "budget")


def stops_climbing(
    wish: Wish, confidence: float, upcoming: Segment | None, now_s: float, reserve_s: float, rows: int, latency: Latency
) -> StoppedBy | None:
    """Why a row that just got an answer of this `confidence` climbs no further, or none if it goes on.

    `upcoming` is what would run next (none: nothing deeper is better), in a batch of `rows`.
    """
    if wish.min_confidence is not None and confidence >= wish.min_confidence:
        return "confidence"
    if upcoming is None:
        return "complete"
    if wish.deadline_s is not None and now_s + latency(upcoming, rows) + reserve_s > wish.deadline_s:
        return "budget"
    return None


def climb_targets(manifest: Manifest) -> tuple[Path, ...]:
    """The paths at which a climbing row gets an answer, each more accurate than the one before: the ladder's rungs,
    then the reference path. Where nothing of the ladder is offered: the Pareto front."""
    accuracies = manifest.accuracies
    targets: list[Path] = []
    for path in (*(manifest.rungs or manifest.front), manifest.reference):
        if not targets or accuracies[path] > accuracies[targets[-1]]:
            targets.append(path)
    return tuple(targets)


def segment_between(before: Path | None, target: Path) -> Segment:
    """What has to run to get from the state after `before` (none: the input) to the answer of `target`.

    Where `target` extends `before` only the further blocks; else it starts again from the input.
    """
    if before is not None and extends(target, before):
        return Segment(target[len(before) :], embed=False)
    return Segment(target, embed=True)


def reachable_segments(manifest: Manifest) -> tuple[Segment, ...]:
    """Every segment that the rules above can run: what has to be profiled."""
    climb = climb_targets(manifest)
    steps = (segment_between(before, target) for before, target in zip((None, *climb), climb, strict=False))
    return tuple(dict.fromkeys((*(Segment(path, embed=True) for path in manifest.offered), *steps)))
