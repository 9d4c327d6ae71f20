"""Data parallelism over processes on one machine: single-threaded workers that meet once a step.

Two processes of one thread each beat one process of two threads when others use the cores too (here 5,000 against
2,300 tokens a second): inside a step nobody waits for anybody. Without a process group every call is the identity.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.nn import Parameter

from rtap_core.errors import RtapError

# torch.distributed and torch.multiprocessing leave their functions untyped.
_dist = cast(Any, torch.distributed)


def rank() -> int:
    """This process's number; 0 writes files and bars."""
    return int(_dist.get_rank()) if _dist.is_initialized() else 0


def average_gradients(parameters: Sequence[Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    if not _dist.is_initialized():
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    _dist.all_reduce(flat)
    flat /= _dist.get_world_size()
    parts: Sequence[Tensor] = flat.split([g.numel() for g in gradients])
    for parameter, gradient, part in zip(parameters, gradients, parts, strict=True):
        parameter.grad = part.view_as(gradient)


def synchronised(*values: float) -> list[float]:
    """The first process's ``values``, in every process."""
    if not _dist.is_initialized():
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64)
    _dist.broadcast(shared, src=0)
    return cast(list[float], cast(Any, shared).tolist())


def wait_for_all() -> None:
    """Return when every process is here."""
    if _dist.is_initialized():
        _dist.barrier()


def run_processes(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Run ``work(*arguments)`` in that many processes that can average gradients; an error in one ends all.

    An error that is meant for the user (RtapError) is raised here as it was raised there.
    """
    if processes == 1:
        work(*arguments)
        return
    multiprocessing = cast(Any, torch.multiprocessing)
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        address = (Path(folder) / "rendezvous").as_uri()
        try:
            multiprocessing.spawn(_enter, args=(processes, address, errors, work, arguments), nprocs=processes)
        except Exception:
            if errors.empty():
                raise
            # The first is the cause: the others fail at losing their peer.
            raise cast(RtapError, errors.get()) from None


def _enter(
    rank_: int, processes: int, address: str, errors: Any, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    _dist.init_process_group("gloo", init_method=address, rank=rank_, world_size=processes)
    try:
        work(*arguments)
    except RtapError as error:
        errors.put(error)
        raise
    finally:
        _dist.destroy_process_group()
