"""How tests are shared out when `make test` runs them in two processes (pytest-xdist)."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together; all that talk to the two shared servers are one group, so each starts once."""
    for item in items:
        uses_shared = {"server", "plain"} & set(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("servers" if uses_shared else item.path.name))
