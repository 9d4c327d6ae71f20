"""A browser and a scripted server for each module's tests."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from playwright.sync_api import Browser, Page

from tests.page.browser import chromium, open_page
from tests.page.scripted_server import ScriptedServer, scripted_server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def _server() -> Iterator[ScriptedServer]:
    with scripted_server() as started:
        yield started


@pytest.fixture
def server(_server: ScriptedServer) -> ScriptedServer:
    """Reset before each test."""
    _server.reset()
    return _server


@pytest.fixture
def visit(browser: Browser, server: ScriptedServer) -> Iterator[Callable[..., Page]]:
    """Opens the page of the scripted server; errors in its console fail the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(open_page(browser, server.url, **options))
