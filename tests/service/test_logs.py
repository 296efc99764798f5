from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import logging
from service.logs import ACCESS_LOGGER, configure_logs, request_id

configure_logs({format!r})
logging.getLogger("somewhere").warning("before %d", 1)
request_id.set("this-one")
logging.getLogger("uvicorn.error").info("within", extra={{"color_message": "colours"}})
logging.getLogger("httpx").info("not to be seen")
logging.getLogger(ACCESS_LOGGER).info("", extra={{"request_id": "this-one", "status": 200}})
"""


def _logs(log_format: str) -> tuple[list[str], list[str]]:
    """The lines on stdout and stderr of a process that logs."""
    command = [sys.executable, "-c", CODE.format(format=log_format)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_messages_as_json_name_the_request() -> None:
    _, messages = _logs("json")
    first, second = map(json.loads, messages)
    assert first.pop("time") <= second.pop("time")
    assert first == {"level": "WARNING", "logger": "somewhere", "message": "before 1"}
    assert second == {"level": "INFO", "logger": "uvicorn.error", "message": "within", "request_id": "this-one"}


def test_messages_as_text_are_for_people() -> None:
    assert _logs("text")[1] == ["WARNING:     before 1", "INFO:     within"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_access_log_is_json_and_apart_from_the_messages(log_format: str) -> None:
    (line,), _ = _logs(log_format)
    content = json.loads(line)
    assert content.pop("time").endswith("+00:00")
    assert content == {"request_id": "this-one", "status": 200}
