"""New versions of models while serving: found in the repository, loaded beside the old, then served instead."""

from __future__ import annotations

import asyncio
import logging
import time

from service.context import Context

logger = logging.getLogger(__name__)


async def watch_repository(context: Context) -> None:
    """Look for new versions every `poll_s` seconds, for ever; 0: never.

    A version that cannot be loaded keeps the old one serving, and is tried again: it may be a copy that is not whole yet.
    """
    poll_s = context.settings.poll_s
    refused: dict[tuple[str, int], str] = {}
    while poll_s > 0:
        await asyncio.sleep(poll_s)
        try:
            found = await asyncio.to_thread(context.repository.newer)
        except OSError as exc:
            logger.warning("the repository cannot be searched for new versions: %s", exc)
            continue
        for name, version in found:
            try:
                await load_version(context, name, version)
            except Exception as exc:  # noqa: BLE001 (whatever is wrong with it, the watch goes on)
                if refused.get((name, version)) != str(exc):  # said once, not every time
                    logger.error("version %d of %s is not served: %s", version, name, exc)  # noqa: TRY400
                    context.metrics.reloads.labels(name, "false").inc()
                refused[name, version] = str(exc)


async def load_version(context: Context, name: str, version: int) -> None:
    """Serve this version of a model instead of the one served now, without a gap: rows that wait keep the old one.
    Nothing to do, if it or a later one is served by now; nothing done, if the server is told to stop meanwhile.

    Raises:
        BundleError: it is damaged or not whole, or its settings ask for what it does not offer.
    """
    repository, engine = context.repository, context.engine
    async with context.loading:
        served = repository.models.get(name)
        if served is not None and served.version >= version:
            return
        model = await asyncio.to_thread(repository.load, name, version)
        # Beside the inference thread, which goes on serving: what is measured now errs on the slow side, and is corrected.
        await asyncio.to_thread(model.warm_up, context.settings.max_batch, time.monotonic, lambda: engine.stopping)
        if model.profile is None:
            return
        engine.add(model)
        before = repository.replace(model)
        if before is not None:
            engine.retire(before)
    context.metrics.reloads.labels(name, "true").inc()
    logger.info("serving version %d of %s", version, name)
