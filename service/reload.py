"""New versions of models while serving: found in the repository, loaded beside the old, then served instead."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

from family.manifest import BundleError
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
            except (BundleError, ValueError) as exc:
                if refused.get((name, version)) != str(exc):  # said once, not every time
                    logger.error("version %d of %s is not served: %s", version, name, exc)  # noqa: TRY400
                    context.metrics.reloads.labels(name, "false").inc()
                refused[name, version] = str(exc)


async def load_version(context: Context, name: str, version: int) -> None:
    """Serve this version of a model instead of the one served now, without a gap: rows that wait keep the old one.

    Raises:
        BundleError: it is damaged or not whole.
        ValueError: its policy cannot be made of what it offers.
    """
    model = await asyncio.to_thread(context.repository.load, name, version)
    # Beside the inference thread, which goes on serving: what is measured now errs on the slow side, and is corrected.
    await asyncio.to_thread(model.warm_up, context.settings.max_batch, time.monotonic, threading.Event().is_set)
    context.engine.add(model)
    before = context.repository.replace(model)
    if before is not None:
        context.engine.retire(before)
    context.metrics.reloads.labels(name, "true").inc()
    logger.info("serving version %d of %s", version, name)
