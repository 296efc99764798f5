"""The server's logs: its messages on stderr, as text or JSON, and the access log, always JSON, on stdout."""

from __future__ import annotations

import logging.config
from contextvars import ContextVar
from typing import Literal

from pythonjsonlogger.core import RESERVED_ATTRS

ACCESS_LOGGER = "hbll.access"

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that is being answered, for whatever is logged meanwhile."""


class _WithRequestId(logging.Filter):
    """Adds the request's id to records within a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        if (current := request_id.get()) is not None:
            record.request_id = current
        return True


def configure_logs(log_format: Literal["text", "json"]) -> None:
    """Set up all logging of the process, uvicorn's included."""
    formatter = "pythonjsonlogger.json.JsonFormatter"
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"request_id": {"()": _WithRequestId}},
            "formatters": {
                "text": {"format": "%(levelname)s:     %(message)s"},
                "json": {
                    "()": formatter,
                    "fmt": "%(levelname)s %(name)s %(message)s",
                    "rename_fields": {"levelname": "level", "name": "logger"},
                    "timestamp": "time",
                    "reserved_attrs": [*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
                },
                "access": {"()": formatter, "fmt": "%(request_id)s", "timestamp": "time"},
            },
            "handlers": {
                "messages": {
                    "class": "logging.StreamHandler",
                    "stream": "ext://sys.stderr",
                    "formatter": log_format,
                    "filters": ["request_id"],
                },
                "access": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "access"},
            },
            "root": {"level": "INFO", "handlers": ["messages"]},
            "loggers": {
                "httpx": {"level": "WARNING"},
                ACCESS_LOGGER: {"level": "INFO", "handlers": ["access"], "propagate": False},
            },
        }
    )
