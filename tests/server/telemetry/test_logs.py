"""Log format of the server process."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rtap_server.telemetry.logs import LOGGER, announce, use_json


@pytest.fixture
def restored() -> Iterator[None]:
    """Restore the loggers that `use_json` changes."""
    loggers = [logging.getLogger(), logging.getLogger(LOGGER)]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    factory, disabled = logging.getLogRecordFactory(), logging.root.manager.disable
    logging.setLogRecordFactory(logging.LogRecord)  # not vLLM's, where another test has imported it
    logging.disable(logging.NOTSET)
    loggers[0].setLevel(logging.WARNING)
    yield
    logging.setLogRecordFactory(factory)
    logging.disable(disabled)
    logging.captureWarnings(False)
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_the_commands_own_sentences_are_on_stderr_or_in_the_log(restored, capsys):
    announce("loading x")
    assert capsys.readouterr().err == "rtap serve: loading x\n"
    use_json("%(levelname)s %(name)s %(message)s")
    announce("ready at y")
    logging.getLogger("some.library").warning("careful")
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [json.loads(line) for line in captured.out.splitlines()] == [
        {"levelname": "INFO", "name": "rtap", "message": "ready at y"},
        {"levelname": "WARNING", "name": "some.library", "message": "careful"},
    ]


WRITES = """
import logging, sys
from rtap_server.telemetry.logs import announce, drop_unwritable_output, use_json
drop_unwritable_output()
for number in range(2_000):
    announce("x" * 100)
    print(number, "\\ud800")
    print(number, "\\ud800", file=sys.stderr)
use_json("%(message)s")
announce("x" * 100_000)
logging.getLogger("library").error("x")
"""


@pytest.mark.parametrize("where", ["full disk", "closed pipe", "full pipe", "closed file"])
def test_output_that_cannot_be_written_is_dropped(where):
    """The exit code shows that nothing was raised, not even when Python flushed the files at its end."""
    reader, writer = os.pipe()
    if where == "closed pipe":
        os.close(reader)
    os.set_blocking(writer, where != "full pipe")
    command = [sys.executable, "-c", WRITES]
    if where == "closed file":
        done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=False)
    else:
        output = os.open("/dev/full", os.O_WRONLY) if where == "full disk" else writer
        done = subprocess.run(command, stdout=output, stderr=output, check=False)
    assert done.returncode == 0
