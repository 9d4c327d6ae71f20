"""Run the commands and programs of README and docs against a live server, with its address and reply ids put in."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import PAGES, Command, blocks, commands

ADDRESS = "http://127.0.0.1:8000"
CURLS = [command for page in PAGES for command in commands(page) if command.words[0] == "curl"]
TALKING = (("rtap", "ask"), ("rtap", "chat"), ("rtap", "doctor"))
TERMINAL = list({c.words: c for page in PAGES for c in commands(page) if c.words[:2] in TALKING}.values())  # each once
PROGRAMS = [(page.name, code) for page in PAGES for code in blocks(page, "python")]
ASKED = "make 82 from 3, 7, 25"


@pytest.mark.parametrize("command", CURLS, ids=lambda c: f"{c.page} {c.words[2].removeprefix(ADDRESS)}")
def test_curl(server, command: Command):
    text = command.text
    if "/feedback" in text:
        reply = server.client.chat.completions.create(model="rtap", messages=[{"role": "user", "content": ASKED}])
        text = re.sub(r"chatcmpl-[0-9a-f]+", reply.id, text)
    done = subprocess.run(
        ["bash", "-c", text.replace(ADDRESS, server.url)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    if "/metrics" in text:
        assert "rtap_requests_total" in done.stdout
    elif '"stream": true' in text:
        events = [json.loads(line.removeprefix("data: ")) for line in done.stdout.split("\n\n") if line[6:7] == "{"]
        assert [e for e in events if e.get("rtap", {}).get("event") == "cycle"]
        assert done.stdout.rstrip().endswith("data: [DONE]")
    else:
        reply = json.loads(done.stdout)
        assert "error" not in reply, reply
        assert not ("/chat/" in text and reply["rtap"]["stop_reason"] not in ("threshold", "max_cycles"))


@pytest.mark.slow
@pytest.mark.parametrize("command", TERMINAL, ids=lambda c: f"{c.page} {' '.join(c.words[1:4])}")
def test_the_terminal(server, command: Command, tmp_path):
    (tmp_path / "question.txt").write_text(ASKED)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", command.text], cwd=tmp_path, input=f"{ASKED}\n", capture_output=True, text=True, timeout=120,
        env=os.environ | {"RTAP_URL": server.url, "PATH": path},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    if command.words[1] == "doctor":
        assert "vllm" in done.stdout.lower()  # its exit code is 1 where this machine lacks something
        return
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d", done.stdout)
    assert "no answer" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), PROGRAMS, ids=lambda value: value if value.endswith(".md") else "")
def test_python(server, page, code):
    # Without the first, importing litellm downloads its price list.
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "RTAP_URL": server.url}
    done = subprocess.run(
        [sys.executable, "-c", code.replace(ADDRESS, server.url)], capture_output=True, text=True, timeout=240,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"threshold|max_cycles|\d", done.stdout)


def test_open_webui_can_show_a_stream(server):
    """It shows a delta's reasoning as thinking and its content as the answer. A chunk with a top-level "event", or with
    an "error" and no choices, would not be shown."""
    thinking = shown = ""
    changes = 0  # from thinking to content
    request = {
        "model": "rtap",
        "messages": [{"role": "user", "content": ASKED}],
        "seed": 9,
        "stream": True,
        "extra_body": {"rtap": {"threshold": 1.0, "max_cycles": 2}},
    }
    for chunk in server.client.chat.completions.create(**request):
        raw = chunk.model_dump()
        assert "event" not in raw
        assert raw["choices"]
        delta = raw["choices"][0]["delta"]
        thought = delta.get("reasoning_content") or delta.get("reasoning") or delta.get("thinking")
        assert not (thought and delta.get("content"))
        assert delta.get("reasoning_content") == delta.get("reasoning")
        changes += bool(delta.get("content") and not shown)
        assert not (thought and shown)  # all thinking comes before the answer
        thinking += thought or ""
        shown += delta.get("content") or ""
    assert changes == 1
    assert "=" in thinking
    assert re.fullmatch(r"[\d+*()-]+", shown)
