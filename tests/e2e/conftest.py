"""What the tests of real servers share beside `tests.conftest.server`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.held import HeldServer


@pytest.fixture
def held() -> Iterator[HeldServer]:
    server = HeldServer()
    yield server
    server.close()
