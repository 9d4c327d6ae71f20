"""Distribution of tests over the processes of ``pytest -n``, and signals of the processes that tests start."""

import signal
from collections.abc import Callable

import pytest
from xdist.scheduler import LoadFileScheduling


class ByFile(LoadFileScheduling):
    """One process for each file, and one for all of tests/e2e, which share servers.

    ``--dist loadgroup`` would do this by marks, but xdist 3.8 appends the group to ``Item._nodeid``, which pytest 9.2
    no longer reads."""

    def _split_scope(self, nodeid: str) -> str:
        return "e2e" if nodeid.startswith("tests/e2e/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Callable[..., None]) -> ByFile:
    return ByFile(config, log)


def pytest_configure() -> None:
    """Under nohup, servers that tests start would ignore SIGHUP too."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
