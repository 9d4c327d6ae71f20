"""Isolate an engine process from signals of the server's terminal, and end it with the server."""

import multiprocessing
import os
import signal
from threading import Thread

from rtap_server.telemetry.logs import drop_unwritable_output


def isolate() -> None:
    """Prepare the running process, which multiprocessing has started, for its work as an engine.

    In its own session it receives no signal that is sent to the server's process group: Ctrl-C, a closed terminal,
    ``timeout``. vLLM would stop at the first one, with the requests that a graceful shutdown lets finish."""
    os.setsid()
    drop_unwritable_output()
    Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    """Kill this process and all that it started once its parent has ended, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
