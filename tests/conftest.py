"""How tests are spread over `make test`'s processes."""

from pathlib import PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

# Files of e2e that start servers of their own and use none of the shared ones.
OWN_SERVERS = {
    "test_own_model.py",
    "test_keys.py",
    "test_pictures.py",
    "test_remote_teacher.py",
    "test_think_format.py",
}
# The longest first, so that no process is left with one when the others have nothing more to do.
LONGEST = [
    "e2e",
    "tests/training/rl/test_processes.py",
    "tests/training/test_resume.py",
    "tests/training/test_commands.py",
    "tests/training/test_smoke.py",
    "tests/training/rl/test_rl_command.py",
    "tests/e2e/test_own_model.py",
    "tests/e2e/test_pictures.py",
    "tests/e2e/test_think_format.py",
    "tests/e2e/test_remote_teacher.py",
    "tests/e2e/test_keys.py",
]


def group_of(nodeid: str) -> str:
    """Tests of one group run in one process. Files stay whole, so that their fixtures are made once; so do all that
    share servers."""
    path = PurePosixPath(nodeid.partition("::")[0])
    return "e2e" if path.parent.name == "e2e" and path.name not in OWN_SERVERS else str(path)


def turn_of(nodeid: str) -> int:
    """When the test's group is begun: the lower, the earlier."""
    group = group_of(nodeid)
    return LONGEST.index(group) if group in LONGEST else len(LONGEST)


class ByGroup(LoadScopeScheduling):
    """What `--dist loadgroup` is for; that does not see its marks under this pytest, and starts every server twice."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config) -> ByGroup:
    config.option.loadscopereorder = False  # xdist would begin the groups of most tests first
    return ByGroup(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: turn_of(item.nodeid))
