"""The executor of an engine on CPU that is one process: vLLM's own, without a dozen threads that wait for nobody.

For each way in which a model can be split vLLM makes two process groups, and each of gloo's has a thread that wakes up
a hundred times a second: thirteen in an engine, 2.5 % of a core while it is idle, twice with a generator. Here only the
default group has one (docs/evaluation.md, "Overhead", has what that is worth).
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg
from vllm.v1.executor.uniproc_executor import UniProcExecutor

assert fake_pg  # imported because it registers torch's backend "fake"


class LoneExecutor(UniProcExecutor):
    """vLLM's executor of one process. The groups that it makes have a single member and no thread."""

    def _init_executor(self) -> None:
        with groups_without_threads():
            super()._init_executor()


@contextmanager
def groups_without_threads() -> Generator[None]:
    """While it lasts, ``torch.distributed.new_group`` makes groups of torch's "fake" backend, whatever is asked for.
    It sends nothing, which is all that a group of one member has to do; ValueError where there are more."""
    new_group = cast(Callable[..., Any], dist.new_group)

    def without_threads(ranks: Sequence[int] | None = None, **options: Any) -> Any:
        if dist.get_world_size() != 1:
            raise ValueError("LoneExecutor is for a model that is not split: name another executor")
        return new_group(ranks, **(options | {"backend": dist.Backend.FAKE}))

    dist.new_group = without_threads
    try:
        yield
    finally:
        dist.new_group = new_group
