"""Which path a request gets: pure functions of what it wishes, the time left, and the latency profile.

No clock, no queue, no runtime. The rules:

- an explicit path or depth is obeyed exactly;
- with a confidence target or a certified risk a row *climbs* the manifest's fixed sequence until it is confident
  enough or the next segment would not finish within the budget;
- with a budget alone it gets the best path that fits into the time left, at the least the shallowest;
- without any wish it gets the reference path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from family.manifest import Manifest
from family.tree import InvalidPath, Path, extends, format_path
from service.errors import InvalidInput, NotOffered
from service.profile import Segment

StoppedBy = Literal["depth", "path", "confidence", "risk", "budget", "complete"]
Depth = int | Literal["best", "full"]
Latency = Callable[[Segment, int], float]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks for, resolved against its model.

    At most one of `path` (run exactly this) and `exit_at` (climb until the calibrated confidence is at least this) is
    given; `asked_as` is what an answer that fulfils it is `stopped_by`. `deadline_s` is on the monotonic clock; a
    `strict` request would rather be refused than late. `priority`: 1 is the highest, 0 none given.
    """

    path: Path | None = None
    exit_at: float | None = None
    asked_as: Literal["depth", "path", "confidence", "risk"] = "path"
    deadline_s: float | None = None
    strict: bool = False
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """A whole path to run, and why the answer will have its depth."""

    path: Path
    stopped_by: StoppedBy


def resolve_wish(
    manifest: Manifest,
    *,
    depth: Depth | None = None,
    path: str | None = None,
    min_confidence: float | None = None,
    max_risk: float | None = None,
    deadline_s: float | None = None,
    strict: bool = False,
    priority: int = 0,
) -> Wish:
    """What a request's words mean for this model. At most one of the first four is given.

    Raises:
        InvalidInput: the path is none of the tree's.
        NotOffered: the model does not offer the path, the depth or the risk level.
    """
    if path is not None:
        try:
            nodes = manifest.tree.parse(path)
        except InvalidPath as exc:
            raise InvalidInput(str(exc)) from exc
        return Wish(_offered(manifest, nodes, f"path {path}"), None, "path", deadline_s, strict, priority)
    if depth is not None:
        return Wish(_path_of_depth(manifest, depth), None, "depth", deadline_s, strict, priority)
    if max_risk is not None:
        return Wish(None, _certified_threshold(manifest, max_risk), "risk", deadline_s, strict, priority)
    if min_confidence is not None:
        return Wish(None, min_confidence, "confidence", deadline_s, strict, priority)
    return Wish(deadline_s=deadline_s, strict=strict, priority=priority)


def _path_of_depth(manifest: Manifest, depth: Depth) -> Path:
    if depth == "best":
        return manifest.reference
    if depth == "full":
        return _offered(manifest, manifest.tree.full, "the full path")
    best = manifest.best_by_depth
    if depth not in best:
        offered = ", ".join(map(str, best))
        raise NotOffered(f"depth {depth} is not offered: expected one of {offered}, best or full", offered=list(best))
    return best[depth]


def _certified_threshold(manifest: Manifest, max_risk: float) -> float:
    levels = manifest.certificate.levels if manifest.certificate else ()
    for level in levels:
        if level.epsilon == max_risk:
            return level.threshold
    offered = [level.epsilon for level in levels]
    expected = f"expected one of {', '.join(map(str, offered))}" if offered else "this model certifies none"
    raise NotOffered(f"max_risk {max_risk:g} is not certified: {expected}", offered=offered)


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


def least_segment(manifest: Manifest, wish: Wish) -> Segment:
    """The least that has to run for an answer: the explicit path, the first of the climb, else the shallowest path."""
    if wish.path is not None:
        return Segment(wish.path, embed=True)
    return Segment(manifest.climb[0] if wish.exit_at is not None else manifest.front[0], embed=True)


def stops_climbing(
    wish: Wish, confidence: float, upcoming: Segment | None, now_s: float, reserve_s: float, rows: int, latency: Latency
) -> StoppedBy | None:
    """Why a row that just got an answer of this `confidence` climbs no further, or none if it goes on.

    `upcoming` is what would run next (none: nothing deeper is better), in a batch of `rows`.
    """
    if wish.exit_at is not None and confidence >= wish.exit_at:
        return wish.asked_as
    if upcoming is None:
        return "complete"
    if wish.deadline_s is not None and now_s + latency(upcoming, rows) + reserve_s > wish.deadline_s:
        return "budget"
    return None


def segment_between(before: Path | None, target: Path) -> Segment:
    """What has to run to get from the state after `before` (none: the input) to the answer of `target`.

    Where `target` extends `before` only the further blocks; else it starts again from the input.
    """
    if before is not None and extends(target, before):
        return Segment(target[len(before) :], embed=False)
    return Segment(target, embed=True)


def reachable_segments(manifest: Manifest) -> tuple[Segment, ...]:
    """Every segment that the rules above can run: what has to be profiled."""
    climb = manifest.climb
    steps = (segment_between(before, target) for before, target in zip((None, *climb), climb, strict=False))
    return tuple(dict.fromkeys((*(Segment(path, embed=True) for path in manifest.offered), *steps)))
