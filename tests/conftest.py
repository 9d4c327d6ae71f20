"""How tests are spread over `make test`'s two processes."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files stay whole, so that their fixtures are made once. Those that share servers stay in one process."""
    for item in items:
        group = item.path.relative_to(HERE)
        item.add_marker(pytest.mark.xdist_group("e2e" if group.parts[0] == "e2e" else str(group)))
