"""What a request asks for, resolved against its model. Pure: no clock, no queue, no runtime."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from family.manifest import Manifest
from family.tree import InvalidPath, Path, format_path
from service.errors import InvalidInput, NotOffered

StoppedBy = Literal["depth", "path", "confidence", "risk", "budget", "load", "complete"]
Depth = int | Literal["best", "full"]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks for, resolved against its model.

    At most one of `path` (run exactly this) and `exit_at` (climb until the calibrated confidence is at least this) is
    given; `asked_as` is what an answer that fulfils it is `stopped_by`. `deadline_s` is on the monotonic clock; a
    `strict` request would rather be refused than late. Among equal deadlines the `priority` counts: 1 is the highest, 0
    none given. Without a deadline it waits for at most about `patience_s` behind others. `risk` is the certified level
    that `exit_at` stands for, if it does.
    """

    path: Path | None = None
    exit_at: float | None = None
    asked_as: Literal["depth", "path", "confidence", "risk"] = "path"
    deadline_s: float | None = None
    strict: bool = False
    priority: int = 0
    patience_s: float = 1.0
    risk: float | None = None


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
    min_depth: int = 1,
) -> Wish:
    """What a request's words mean for this model, which answers with at least `min_depth` blocks. At most one of the
    first four is given.

    Raises:
        InvalidInput: the path is none of the tree's.
        NotOffered: the model does not offer the path, the depth or the risk level, or not at this `min_depth`.
    """
    wish = Wish(deadline_s=deadline_s, strict=strict, priority=priority)
    if path is not None:
        try:
            nodes = manifest.by_name.get(path) or manifest.tree.parse(path)
        except InvalidPath as exc:
            raise InvalidInput(str(exc)) from exc
        return replace(wish, path=_offered(manifest, nodes, f"path {path}", min_depth), asked_as="path")
    if depth is not None:
        return replace(wish, path=_path_of_depth(manifest, depth, min_depth), asked_as="depth")
    if max_risk is not None:
        threshold = _certified_threshold(manifest, max_risk, min_depth)
        return replace(wish, exit_at=threshold, asked_as="risk", risk=max_risk)
    if min_confidence is not None:
        return replace(wish, exit_at=min_confidence, asked_as="confidence")
    return wish


def _path_of_depth(manifest: Manifest, depth: Depth, min_depth: int) -> Path:
    if depth == "best":
        return max(
            (path for path in manifest.best_by_depth.values() if len(path) >= min_depth),
            key=lambda path: (manifest.accuracies[path], -len(path)),
        )
    if depth == "full":
        return _offered(manifest, manifest.tree.full, "the full path", min_depth)
    best = {blocks: path for blocks, path in manifest.best_by_depth.items() if blocks >= min_depth}
    if depth not in best:
        offered = ", ".join(map(str, best))
        raise NotOffered(f"depth {depth} is not offered: expected one of {offered}, best or full", offered=list(best))
    return best[depth]


def _certified_threshold(manifest: Manifest, max_risk: float, min_depth: int) -> float:
    levels = manifest.certificate.levels if manifest.certificate else ()
    offered = [level.epsilon for level in levels]
    if offered and len(manifest.climb[0]) < min_depth:
        # The certificate is for one fixed sequence of exits: with fewer of them its rows would exit elsewhere.
        raise NotOffered(
            f"max_risk is certified for exits at {len(manifest.climb[0])} blocks, and this server answers with at least "
            f"{min_depth}",
            offered=[],
        )
    for level in levels:
        if level.epsilon == max_risk:
            return level.threshold
    expected = f"expected one of {', '.join(map(str, offered))}" if offered else "this model certifies none"
    raise NotOffered(f"max_risk {max_risk:g} is not certified: {expected}", offered=offered)


def _offered(manifest: Manifest, nodes: Path, name: str, min_depth: int) -> Path:
    if nodes not in manifest.offered or len(nodes) < min_depth:
        offered = [format_path(path) for path in manifest.offered if len(path) >= min_depth]
        raise NotOffered(f"{name} is not offered by this model", offered=offered)
    return nodes
