"""How tests are spread over `make test`'s processes."""

from pathlib import PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

# Files of e2e that start servers of their own and ask none of the shared ones.
OWN_SERVERS = {"test_keys", "test_pictures", "test_remote_teacher", "test_think_format", "test_two_witnesses"}


def group_of(nodeid: str) -> str:
    """Tests of one group run in one process. Files stay whole, so that their fixtures are made once; so do all that
    share servers."""
    path = PurePosixPath(nodeid.partition("::")[0])
    return "e2e" if "e2e" in path.parts and path.stem not in OWN_SERVERS else str(path)


class ByGroup(LoadScopeScheduling):
    """xdist's own `--dist loadgroup` does not see its marks under this pytest: every process then starts every server."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config) -> ByGroup:
    return ByGroup(config)
