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


def synchronised(value: float) -> float:
    """The first process's ``value``, in every process."""
    if not _dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    _dist.broadcast(shared, src=0)
    return float(shared.item())


def run_processes(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Run ``work(*arguments)`` in that many processes that can average gradients; an error in one ends all."""
    if processes == 1:
        work(*arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        address = (Path(folder) / "rendezvous").as_uri()
        cast(Any, torch.multiprocessing).spawn(_enter, args=(processes, address, work, arguments), nprocs=processes)


def _enter(rank_: int, processes: int, address: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _dist.init_process_group("gloo", init_method=address, rank=rank_, world_size=processes)
    try:
        work(*arguments)
    finally:
        _dist.destroy_process_group()
