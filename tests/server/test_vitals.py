"""What an engine is by its processes: the rule on its own, and real processes that work, wait, are stopped and die."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from rtap_server.engine.vitals import Sign, Verdict, Vitals, family, look

QUIET = Sign(is_alive=True, is_busy=False, is_stopped=False, reads_disk=False, cpu_seconds=1.0)


def sign(**changes: object) -> Sign:
    return Sign(**{name: changes.get(name, getattr(QUIET, name)) for name in QUIET.__slots__})  # type: ignore[arg-type]


def verdicts(signs: list[Sign]) -> list[Verdict]:
    """One look a second; 3 s of silence are too much."""
    vitals = Vitals(3.0, now=0.0)
    return [vitals.observe(seen, float(second)) for second, seen in enumerate(signs, 1)]


def test_an_engine_with_work_that_uses_no_processor_falls_silent():
    seen = [sign(is_busy=True)] * 6
    assert verdicts(seen) == [Verdict.ALIVE] * 4 + [Verdict.SILENT] * 2  # the first look is the first that it worked


@pytest.mark.parametrize(
    "signs",
    [
        [sign(is_busy=False)] * 9,
        [sign(is_busy=True, reads_disk=True)] * 9,
        [sign(is_busy=True, cpu_seconds=1.0 + second / 100) for second in range(9)],
        [sign(is_busy=second % 3 == 0) for second in range(9)],
    ],
    ids=["idle", "reading", "a long step", "a little work"],
)
def test_an_engine_that_works_or_has_no_work_stays_alive(signs):
    assert set(verdicts(signs)) == {Verdict.ALIVE}


def test_a_stopped_engine_is_silent_even_without_work():
    assert verdicts([sign(is_stopped=True)] * 4) == [Verdict.ALIVE] * 3 + [Verdict.SILENT]


def test_a_dead_engine_is_dead_at_once():
    assert verdicts([sign(is_alive=False)]) == [Verdict.DEAD]


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[bytes]]:
    """A process with one child that computes."""
    code = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-c', 'while True: pass']); print(p.pid, flush=True); p.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        yield process
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
        process.kill()


def test_what_is_gone_has_no_processes(parent):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    assert [process.pid for process in family([gone.pid, parent.pid])][:1] == [parent.pid]


def test_the_processes_of_an_engine_are_looked_at_together(parent):
    processes = family([parent.pid])
    assert len(processes) == 2
    first = look(processes, is_alive=True, is_busy=True)
    assert (first.is_alive, first.is_stopped) == (True, False)
    time.sleep(0.3)
    assert look(processes, is_alive=True, is_busy=True).cpu_seconds > first.cpu_seconds  # its child's
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    assert look(processes, is_alive=True, is_busy=True).is_stopped
    processes[1].kill()
    time.sleep(0.05)
    assert not look(processes, is_alive=True, is_busy=True).is_alive
    assert not look(family([parent.pid]), is_alive=False, is_busy=True).is_alive
