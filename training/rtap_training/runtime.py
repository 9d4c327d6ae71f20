"""Process-wide torch settings (threads, seeds, allocator), and the end of a run of several processes."""

import ctypes
import sys
from random import seed as seed_python
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def configure_torch(threads: int, seed: int) -> None:
    """Set seeds and the thread count, and make glibc keep freed memory.

    Returning large blocks to the kernel after every step made a step 1.4 times slower.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
            mallopt(_M_TOP_PAD, 1 << 26)
    torch.set_num_threads(threads)
    seed_python(seed)
    torch.manual_seed(seed)


def end_processes(accelerator: Any) -> None:
    """Wait for the process that saves, then leave the process group, if there is one."""
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()  # also lets gloo free its last tensors: its end would block on them
        accelerator.end_training()
