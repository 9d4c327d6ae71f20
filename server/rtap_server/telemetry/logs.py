"""Log output of the server process: plain text, or one JSON object a line (``--log-format json``).

JSON lines have the shape of vLLM's own JSON formatter. Request bodies are not logged. Output that cannot be written is
dropped: a full disk or a closed pipe must not fail a request or an engine.
"""

import asyncio
import io
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from threading import Thread

from pythonjsonlogger.json import JsonFormatter
from typing_extensions import Buffer, override

LOGGER = "rtap"
REQUESTS = "rtap.requests"
ERRORS = "rtap.errors"
STDERR = "stderr"

# Warnings and progress bars of libraries in engine processes, which `--verbose` shows.
_WARNINGS = re.compile(r"\[W\d{4} |.*\bWarning: |Triton is installed|.*\d+%.*\d+/\d+ \[")
_MAX_LINE_BYTES = 2**16
_FLUSH_SECONDS = 2.0


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
            setattr(sys, name, _lossy_text(number, None if stream is None else stream.encoding))


def _lossy_text(descriptor: int, encoding: str | None) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(_LossyFile(descriptor, "w", closefd=False))
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)


def announce(message: str, level: int = logging.INFO) -> None:
    """Print one sentence of `rtap serve` to stderr, or log it when logs are JSON."""
    logger = logging.getLogger(LOGGER)
    if logger.handlers:
        logger.log(level, message)
    else:
        print(f"rtap serve: {message}", file=sys.stderr)  # noqa: T201 - the command's own message


@asynccontextmanager
async def loading_progress(message: str) -> AsyncGenerator[None]:
    """Announce ``message``. A terminal also shows the seconds since then, until the block ends."""
    announce(message)
    shows = sys.stderr.isatty() and not logging.getLogger(LOGGER).handlers
    task = asyncio.create_task(_count_seconds()) if shows else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            _show_on_line("")


async def _count_seconds() -> None:
    began = time.monotonic()
    while True:
        _show_on_line(f"… {time.monotonic() - began:.0f} s")
        await asyncio.sleep(1)


def _show_on_line(text: str) -> None:
    """Replace the terminal's current line. ``captured_stderr`` changes ``sys.stderr`` meanwhile."""
    sys.stderr.write(f"\r{text}\x1b[K")
    sys.stderr.flush()


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


def hide_warnings() -> None:
    """Hide warnings of libraries in this process. Errors are shown."""
    warnings.simplefilter("ignore")
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)


@contextmanager
def captured_stderr(*, is_verbose: bool = True) -> Generator[None]:
    """Log what engine processes and native code write to stderr, one record a line.

    Such text may quote a request, so it must not look like records of the log. File descriptor 2 is a pipe while this
    lasts, and processes started meanwhile inherit it. ``sys.stderr`` of this process still writes to the real one."""
    before, real = sys.stderr, os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = _lossy_text(real, "utf-8")  # never closed: logging handlers keep it
    thread = Thread(target=_log_lines, args=(reading, _stderr_logger(), is_verbose), name="stderr", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr = before
        os.dup2(real, 2)
        thread.join(_FLUSH_SECONDS)  # the last lines of a dead engine; a live one keeps the pipe open


def _stderr_logger() -> logging.Logger:
    """JSON records of the root logger's handler, else lines with a prefix on the real stderr."""
    logger = logging.getLogger(STDERR)
    logger.propagate = bool(logging.getLogger(LOGGER).handlers)
    logger.handlers = []
    if not logger.propagate:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("stderr: %(message)s"))
        logger.addHandler(handler)
    return logger


def _log_lines(descriptor: int, logger: logging.Logger, is_verbose: bool) -> None:
    """Read to the end, so that no writer ever waits; logging itself raises nothing."""
    with open(descriptor, "rb") as pipe:
        while line := pipe.readline(_MAX_LINE_BYTES):
            for part in line.decode("utf-8", "backslashreplace").splitlines():
                if part.strip() and (is_verbose or not _WARNINGS.match(part)):
                    logger.warning("%s", _printable(part))


def _printable(text: str) -> str:
    """``text`` with control characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
