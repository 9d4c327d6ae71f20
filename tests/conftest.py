"""How tests are spread over `make test`'s processes."""

from collections.abc import Callable
from pathlib import PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

# Files of e2e that use none of the servers which the rest of them share, and what they start instead.
APART = {
    "test_hardening.py": "server with keys",
    "test_keys.py": "server with keys",
    "test_own_model.py": "model of one's own",
    "test_pictures.py": "server of a vision-language model",
    "test_remote_teacher.py": "teacher",
    "test_think_format.py": "server of another format",
}
# The longest groups first, so that no process is left with one when the others have nothing more to do.
LONGEST = [
    "e2e",
    "tests/training/rl/test_processes.py",
    "tests/training/test_commands.py",
    "tests/training/test_resume.py",
    "tests/training/test_smoke.py",
    "tests/training/rl/test_rl_command.py",
    *dict.fromkeys(APART.values()),
]


def group_of(nodeid: str) -> str:
    """Tests of one group run in one process. Files stay whole, so that their fixtures are made once; so do all that
    share servers."""
    path = PurePosixPath(nodeid.partition("::")[0])
    return APART.get(path.name, "e2e") if path.parent.name == "e2e" else str(path)


def turn_of(nodeid: str) -> int:
    """When the test's group is begun: the lower, the earlier."""
    group = group_of(nodeid)
    return LONGEST.index(group) if group in LONGEST else len(LONGEST)


class ByGroup(LoadScopeScheduling):
    """What `--dist loadgroup` is for; that does not see its marks under this pytest, and starts every server twice."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Callable[..., None]) -> ByGroup:
    config.option.loadscopereorder = False  # xdist would begin with the groups of most tests
    return ByGroup(config, log)  # without xdist's own log it prints each of its steps


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: turn_of(item.nodeid))
