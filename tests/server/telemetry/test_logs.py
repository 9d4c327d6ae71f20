"""Log format of the server process, and what other processes and native code write to its stderr."""

import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rtap_server.telemetry.logs import LOGGER, STDERR, announce, captured_stderr, use_json

# Processes of their own: pytest has file descriptors 1 and 2.
SERVER = r"""
import logging, os, subprocess, sys
from rtap_server.telemetry.logs import captured_stderr, drop_unwritable_output, use_json
drop_unwritable_output()
if sys.argv[1] == "json":
    use_json("%(levelname)s %(name)s %(message)s")
with captured_stderr():
    print("of the server", file=sys.stderr)
    os.write(2, b'native\r{"levelname": "ERROR"}\x1b[2J \xff\n')
    for _ in range(2):  # an engine and its restart
        subprocess.run([sys.executable, "-c", sys.argv[2]])
print("after", file=sys.stderr)
"""
DYING = r"import os; os.write(2, 'Tracebäck\n  last line\n'.encode()); os.kill(os.getpid(), 9)"


@pytest.fixture
def restored() -> Iterator[None]:
    """Restore the loggers that `use_json` changes."""
    loggers = [logging.getLogger(), logging.getLogger(LOGGER), logging.getLogger(STDERR)]
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


def served(mode: str, engine: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", SERVER, mode, engine], stdout=subprocess.PIPE, stderr=stderr, timeout=60, check=False
    )


def test_lines_on_stderr_have_a_prefix_and_no_control_characters():
    done = served("text", DYING)
    assert done.returncode == 0
    last = ["stderr: Tracebäck", "stderr:   last line"]
    lines = done.stderr.decode().splitlines()
    assert sorted(lines) == sorted(
        ["of the server", "stderr: native", 'stderr: {"levelname": "ERROR"}\\x1b[2J \\xff', *last, *last, "after"]
    )
    assert lines[-1] == "after"


def test_lines_on_stderr_are_records_of_a_json_log():
    done = served("json", DYING)
    assert done.stderr.decode().splitlines() == ["of the server", "after"]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(record["name"], record["levelname"]) for record in records} == {("stderr", "WARNING")}
    last = ["Tracebäck", "  last line"]
    assert [record["message"] for record in records] == ["native", '{"levelname": "ERROR"}\\x1b[2J \\xff', *last, *last]


def test_a_full_disk_stops_no_writer():
    """A megabyte is more than a pipe holds."""
    writer = "import os; [os.write(2, b'x' * 1023 + b'\\n') for _ in range(1024)]"
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        assert served("text", writer, full).returncode == 0
    finally:
        os.close(full)


def test_a_live_engine_does_not_delay_the_end(restored):
    """Its later lines go nowhere, without harm to it."""
    with captured_stderr():
        engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert engine.poll() is None
        assert os.fstat(2)
    finally:
        engine.kill()
        engine.wait()


@pytest.mark.parametrize(
    ("line", "is_shown"),
    [
        ("[W1201 07:59:42.015 utils.cpp:68] Warning: NUMA binding", False),
        ("Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00, 47.7it/s]", False),
        ("[E1201 07:59:42.015 utils.cpp:68] Error: NUMA binding", True),
        ("RuntimeError: out of memory, 100%", True),
        ("Killed", True),
    ],
)
def test_warnings_of_engine_processes_are_hidden_and_errors_never(line, is_shown, restored, capfd):
    for is_verbose in (False, True):
        with captured_stderr(is_verbose=is_verbose):
            os.write(2, f"{line}\n".encode())
        assert (f"stderr: {line}" in capfd.readouterr().err) == (is_shown or is_verbose)


def test_a_terminal_shows_the_seconds_of_loading_and_clears_them(restored):
    program = (
        "import asyncio\n"
        "from rtap_server.telemetry.logs import captured_stderr, drop_unwritable_output, loading_progress\n"
        "async def main():\n"
        "    async with loading_progress('loading x'):\n"
        "        with captured_stderr():\n"
        "            await asyncio.sleep(1.3)\n"
        "drop_unwritable_output()\n"
        "asyncio.run(main())\n"
    )
    terminal, side = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", program], stderr=side, timeout=60, check=True)
        shown = os.read(terminal, 10_000).decode()
    finally:
        os.close(terminal)
        os.close(side)
    assert shown == "rtap serve: loading x\r\n\r… 0 s\x1b[K\r… 1 s\x1b[K\r\x1b[K"
