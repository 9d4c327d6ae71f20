"""Log format of the server process: plain text, or one JSON object a line (``--log-format json``).

JSON lines have the shape of vLLM's own JSON formatter. Request bodies are not logged.
"""

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

LOGGER = "rtap"
REQUESTS = "rtap.requests"
ERRORS = "rtap.errors"


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
