"""Client of an rtap server, and the `rtap` command. Imports neither torch, vLLM, server nor training."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rtap")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+checkout"
