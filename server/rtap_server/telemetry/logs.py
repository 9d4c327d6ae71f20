"""Log output of the server process: plain text, or one JSON object a line (``--log-format json``).

JSON lines have the shape of vLLM's own JSON formatter. Request bodies are not logged. Output that cannot be written is
dropped: a full disk or a closed pipe must not fail a request or an engine.
"""

import io
import logging
import os
import sys
from contextlib import suppress

from pythonjsonlogger.json import JsonFormatter
from typing_extensions import Buffer, override

LOGGER = "rtap"
REQUESTS = "rtap.requests"
ERRORS = "rtap.errors"


class _LossyFile(io.FileIO):
    """A file that drops what it cannot write."""

    @override
    def write(self, data: Buffer, /) -> int:
        written = None  # None: a non-blocking pipe is full
        with suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written


def drop_unwritable_output() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` drop what cannot be written, instead of raising an error.

    Standard files that were closed before the start become /dev/null; otherwise a socket would get their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # opens the lowest free number
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # a replaced one, such as pytest's, stays
            buffer = io.BufferedWriter(_LossyFile(number, "w", closefd=False))
            encoding = None if stream is None else stream.encoding
            setattr(sys, name, io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True))


def announce(message: str, level: int = logging.INFO) -> None:
    """Print one sentence of `rtap serve` to stderr, or log it when logs are JSON."""
    logger = logging.getLogger(LOGGER)
    if logger.handlers:
        logger.log(level, message)
    else:
        print(f"rtap serve: {message}", file=sys.stderr)  # noqa: T201 - the command's own message


def use_json(fields: str) -> None:
    """Format log lines as JSON, except those of vLLM and uvicorn, which have their own setting for it.

    fields: of every line, as a ``logging`` format string."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter(fields))
    ours, root = logging.getLogger(LOGGER), logging.getLogger()
    ours.handlers, root.handlers = [handler], [handler]  # root: all other libraries, and warnings
    ours.propagate = False
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)
