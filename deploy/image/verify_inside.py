"""The part of verify.py inside the new namespaces: lock down the image's root, start its server, check it.

Arguments: the image's root, the JSON of its configuration, the file for the observations. Standard library only.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NEW_ROOT = Path("/mnt")
WRITABLE = ("/cache", "/tmp")
READY_SECONDS = 180
QUESTION = "make 82 from 3, 7, 25"
READ_ONLY = ("/app/x", "/opt/rtap/x", "/etc/x", "/usr/x", "/x")


def lock_down(root: Path, user: int) -> None:
    """Mount ``root`` read-only at NEW_ROOT with the mounts of a Docker container; bring loopback up."""

    def mount(*arguments: str | Path) -> None:
        subprocess.run(["mount", *arguments], check=True)

    mount("--make-rprivate", "/")
    mount("--bind", root, NEW_ROOT)
    mount("-o", "remount,bind,ro", NEW_ROOT)
    for folder in WRITABLE:
        owner = f"uid={user},gid={user},mode=0755" if folder != "/tmp" else "mode=1777"
        mount("-t", "tmpfs", "-o", owner, "tmpfs", NEW_ROOT / folder.removeprefix("/"))
    mount("-t", "proc", "proc", NEW_ROOT / "proc")
    mount("-o", "bind,ro", "/sys", NEW_ROOT / "sys")
    mount("-t", "tmpfs", "-o", "mode=0755", "tmpfs", NEW_ROOT / "dev")
    for device in ("null", "zero", "full", "random", "urandom"):
        (NEW_ROOT / "dev" / device).touch()
        mount("--bind", Path("/dev") / device, NEW_ROOT / "dev" / device)
    (NEW_ROOT / "dev/shm").mkdir()
    mount("-t", "tmpfs", "-o", "mode=1777,size=1g", "tmpfs", NEW_ROOT / "dev/shm")
    mount("-o", "remount,ro", NEW_ROOT / "dev")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def contained(config: Mapping[str, Any], command: Sequence[str]) -> list[str]:
    """``command`` as the image's user in the new root, with the image's environment and no capabilities."""
    user, _, group = config["User"].partition(":")
    drop = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--clear-groups"]
    start = ["/usr/bin/env", "--ignore-environment", f"--chdir={config['WorkingDir']}", *config["Env"]]
    as_user = ["/usr/bin/setpriv", f"--reuid={user}", f"--regid={group}", *drop]
    return ["chroot", str(NEW_ROOT), *as_user, *start, *command]


def status_of(port: int, path: str) -> int:
    """HTTP status of a GET; 0 while nothing listens."""
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=4).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def chat(port: int) -> dict[str, Any]:
    """The reply to one chat request."""
    body = {"model": "rtap", "seed": 9, "messages": [{"role": "user", "content": QUESTION}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    reply: dict[str, Any] = json.loads(urllib.request.urlopen(request, timeout=60).read())
    return reply


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> float:
    """Wait for /ready. Returns the seconds."""
    began = time.monotonic()
    while status_of(port, "/ready") != 200:
        if server.poll() is not None or time.monotonic() - began > READY_SECONDS:
            raise SystemExit(f"not ready after {time.monotonic() - began:.0f} s; exit code {server.poll()}")
        time.sleep(0.3)
    return time.monotonic() - began


def privileges(pid: int) -> dict[str, str]:
    """User and capabilities of a process from /proc."""
    lines = (line.partition(":") for line in (NEW_ROOT / f"proc/{pid}/status").read_text().splitlines())
    return {name: value.split()[0] for name, _, value in lines if name in ("Uid", "CapEff", "CapBnd", "NoNewPrivs")}


def written(config: Mapping[str, Any], path: str) -> bool:
    """True when the image's user can create this file."""
    return subprocess.run(contained(config, ["touch", path]), capture_output=True, check=False).returncode == 0


def left_behind(seconds: float = 5) -> list[int]:
    """Processes still running after ``seconds``. Reaps orphans as the namespace's init, like `docker run --init`."""
    until = time.monotonic() + seconds
    while True:
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break
        found = [int(name) for name in os.listdir(NEW_ROOT / "proc") if name.isdigit() and int(name) != os.getpid()]
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


def observe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Start, query and stop the server. Raises AssertionError when a check fails."""
    (port_text,) = config["ExposedPorts"]
    port = int(port_text.split("/")[0])
    server = subprocess.Popen(contained(config, config["Entrypoint"]))
    ready = wait_until_ready(server, port)
    health = config["Healthcheck"]["Test"]
    assert health[0] == "CMD", health
    healthy = subprocess.run(contained(config, health[1:]), check=False).returncode
    assert healthy == 0, f"the health check ended with {healthy}"
    reply = chat(port)
    answer, confidence = reply["choices"][0]["message"]["content"], reply["rtap"]["confidence"]
    assert answer, reply
    assert 0 <= confidence <= 1, reply
    rights = privileges(server.pid)
    assert rights == {
        "Uid": config["User"].split(":")[0], "CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1",
    }, rights  # fmt: skip
    refused = [path for path in READ_ONLY if not written(config, path)]
    assert refused == list(READ_ONLY), f"written: {set(READ_ONLY) - set(refused)}"
    assert all(written(config, f"{folder}/x") for folder in WRITABLE)
    server.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code = server.wait(120)
    assert code == 0, f"SIGTERM: exit code {code}"
    stopped = time.monotonic() - began
    left = left_behind()
    assert not left, f"left behind: {left}"
    return {
        "entry point": " ".join(config["Entrypoint"]),
        "ready after": f"{ready:.0f} s",
        "health check": f"exit code {healthy}",
        "answer": f"{QUESTION!r}: {answer!r}, confidence {confidence}",
        "privileges of the server": ", ".join(f"{k} {v}" for k, v in rights.items()),
        "could not write": ", ".join(refused),
        "could write": ", ".join(WRITABLE),
        "after SIGTERM": f"exit code {code} in {stopped:.1f} s, no process left",
    }


def main(root: Path, config_file: Path, seen: Path) -> None:
    """Called by verify.py under unshare."""
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    lock_down(root, int(config["User"].split(":")[0]))
    seen.write_text(json.dumps(observe(config)), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
