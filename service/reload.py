"""Versions of models that come and go while serving: found in the repository, loaded beside the others, then served; and
models that operators unload and load."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

from family.manifest import BundleError
from service.context import Context
from service.repository import ServedModel
from service.version_policy import choose

logger = logging.getLogger(__name__)


async def watch_repository(context: Context) -> None:
    """Follow the repository every `poll_s` seconds, for ever; 0: never."""
    poll_s = context.settings.poll_s
    while poll_s > 0:
        await asyncio.sleep(poll_s)
        try:
            names = await asyncio.to_thread(context.repository.names_found)
        except OSError as exc:
            logger.warning("the repository cannot be searched for new versions: %s", exc)
            continue
        for name in sorted({*names, *context.repository.models, *context.repository.refused}):
            try:
                await follow(context, name)
            except Exception:  # one model less is no reason to look for no more
                logger.exception("new versions of %s cannot be looked for", name)


async def follow(context: Context, name: str) -> dict[int, Exception]:
    """Serve of this model what its settings choose from the versions that are in the repository now and can be loaded.
    Returns those that cannot, which are tried again next time, as a copy may not be whole yet; and those that are served
    and were written over since.

    New versions are served before others go, and rows that wait keep the version that they came for, so no request
    fails. A model of which nothing is left in the repository is served as before: its last version never goes. Of one that
    an operator unloaded nothing is served. If the server is told to stop meanwhile nothing more is done.

    Raises:
        OSError: the folder cannot be read.
    """
    async with context.loading:
        return {} if name in context.repository.unloaded else await _follow(context, name)


async def load(context: Context, name: str) -> dict[int, Exception]:
    """As `follow`; from now on it is followed again if it was unloaded."""
    async with context.loading:
        context.repository.unloaded.pop(name, None)
        return await _follow(context, name)


async def unload(context: Context, name: str) -> None:
    """Serve this model no more, in no version, until it is loaded. Rows that wait are answered, then it is freed. What is
    unloaded already stays so.

    Raises:
        UnknownModel: there is none of that name.
    """
    async with context.loading:
        for model in context.repository.unload(name):
            context.engine.retire(model)
            logger.info("version %d of %s is unloaded", model.version, name)


async def _follow(context: Context, name: str) -> dict[int, Exception]:
    repository, engine = context.repository, context.engine
    found = await asyncio.to_thread(repository.versions_found, name)
    policy = context.settings.of_model(name).versions
    failed: dict[int, Exception] = {}
    while True:
        chosen = choose(policy, set(found) - failed.keys())
        served = _served(context, name)
        missing = [version for version in chosen if version not in served]
        if not missing:
            break
        try:
            if not await _serve(context, name, missing[0]):
                return failed
        except Exception as exc:  # noqa: BLE001 (whatever is wrong with it, the others are served)
            failed[missing[0]] = exc
    for version, model in served.items():
        if chosen and version not in chosen:
            repository.remove(model)
            engine.retire(model)
            logger.info("version %d of %s is served no more", version, name)
    _tell(context, name, failed)
    return failed | await _stale(context, name, found)


async def _stale(context: Context, name: str, found: Collection[int]) -> dict[int, Exception]:
    """Note which served versions are no longer those in their folders. A version is served as it was loaded, as answers and
    metrics are told apart by its number; so one that was written over is told of, and returned."""
    repository = context.repository
    changed: dict[int, Exception] = {}
    reasons: dict[int, str] = {}
    for version, model in _served(context, name).items():
        if version not in found:
            reasons[version] = "its folder is gone; it is served until there is another version, or it is unloaded"
        elif await asyncio.to_thread(repository.is_changed, model):
            different = "its folder now holds a different bundle, which is not served"
            reasons[version] = f"{different}: export it under a new version number"
            changed[version] = BundleError(f"version {version} is served as it was loaded: {reasons[version]}")
    for version, reason in reasons.items():
        if repository.stale.get(name, {}).get(version) != reason:
            logger.warning("version %d of %s: %s", version, name, reason)
    if reasons:
        repository.stale[name] = reasons
    else:
        repository.stale.pop(name, None)
    return changed


async def _serve(context: Context, name: str, version: int) -> bool:
    """Load and warm up a version, and serve it; false if the server is told to stop meanwhile."""
    repository, engine = context.repository, context.engine
    model = await asyncio.to_thread(repository.load, name, version)
    # Beside the inference thread, which goes on serving: what is measured now errs on the slow side, and is corrected.
    await asyncio.to_thread(model.warm_up, context.settings.max_batch, time.monotonic, lambda: engine.stopping)
    if model.profile is None:
        return False
    engine.add(model)
    repository.add(model)
    context.metrics.reloads.labels(name, "true").inc()
    logger.info("serving version %d of %s", version, name)
    return True


def _served(context: Context, name: str) -> dict[int, ServedModel]:
    return {model.version: model for model in context.repository.served if model.name == name}


def _tell(context: Context, name: str, failed: dict[int, Exception]) -> None:
    """Say what is refused and why: in the log once, not every time."""
    before = context.repository.refused.get(name, {})
    reasons = {version: str(exc) for version, exc in failed.items()}
    for version, reason in reasons.items():
        if before.get(version) != reason:
            logger.error("version %d of %s is not served: %s", version, name, reason)
            context.metrics.reloads.labels(name, "false").inc()
    if reasons:
        context.repository.refused[name] = reasons
    else:
        context.repository.refused.pop(name, None)
