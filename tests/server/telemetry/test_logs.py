"""Log format of the server process."""

import json
import logging
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
