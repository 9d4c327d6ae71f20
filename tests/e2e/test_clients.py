"""Client libraries against a server with an operator's flags: five uses each under `single` and `confidence`.

Each library runs clients/use_LIBRARY in a process and an environment of its own, because the libraries' requirements
conflict with vLLM's. The environments are installed once, into build/clients."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ROOT, free_port, rtap_command, running

pytestmark = pytest.mark.slow

HERE = Path(__file__).with_name("clients")
FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
# The bundled model never learned JSON.
SHORT_JSON = ("--logits-processors", "tests.e2e.clients.short_json:ShortJson")
POLICIES = {
    "single": {"policy": "single"},
    "confidence": {"policy": "confidence", "threshold": 1.0, "max_cycles": 2, "drafts": True},  # which all pass over
}
USES = ("basic", "stream", "structured", "tool", "streamed_tool")


@dataclass(frozen=True)
class Library:
    """error: the library's class for a 400. answered, called: its finish reasons for an answer and for a tool call."""

    environment: str  # a requirements file, or package.json
    error: str
    answered: str = "stop"
    called: str = "tool_calls"


NEWEST, OPENAI_2, NODE = "requirements.txt", "requirements-openai2.txt", "package.json"
LIBRARIES = {
    "openai_chat": Library(NEWEST, "openai.BadRequestError"),
    "openai_responses": Library(NEWEST, "openai.BadRequestError", "completed", "completed"),
    "anthropic": Library(NEWEST, "anthropic.BadRequestError", "end_turn", "tool_use"),
    "litellm": Library(NEWEST, "litellm.exceptions.BadRequestError"),
    "langchain": Library(NEWEST, "openai.BadRequestError"),
    "pydantic_ai": Library(NEWEST, "pydantic_ai.exceptions.ModelHTTPError"),
    "openai_agents": Library(NEWEST, "openai.BadRequestError"),
    "smolagents": Library(NEWEST, "openai.BadRequestError"),
    "dspy": Library(NEWEST, "dspy.utils.exceptions.LMInvalidRequestError"),
    "instructor": Library(OPENAI_2, "instructor.v2.core.errors.InstructorRetryException"),
    "llama_index": Library(OPENAI_2, "openai.BadRequestError"),
    "openai": Library(NODE, "BadRequestError"),
    "ai_sdk": Library(NODE, "AI_APICallError", called="tool-calls"),
}
needs_node = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
every_library = pytest.mark.parametrize(
    "library",
    [pytest.param(name, marks=needs_node if lib.environment == NODE else ()) for name, lib in LIBRARIES.items()],
)


def _run(*command: str | Path, cwd: Path = ROOT, failure: str) -> str:
    """The standard output of a command. ``failure`` begins the message if it fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI_"))}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        pytest.fail(f"{failure}: {done.stderr[-3000:]}")
    return done.stdout


@pytest.fixture(scope="module")
def environment() -> Callable[[str], list[str | Path]]:
    """Install what a file lists, unless that was done before; returns the interpreter and the scripts' folder."""

    def install(name: str) -> list[str | Path]:
        versions = (HERE / name).read_bytes() + sys.version.encode()
        folder = ROOT / "build" / "clients" / f"{Path(name).stem}-{hashlib.sha256(versions).hexdigest()[:12]}"
        interpreter, scripts = (folder / "bin" / "python", HERE) if name != NODE else (Path("node"), folder)
        failure = f"cannot install {HERE / name} into {folder}"
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            if name == NODE:
                folder.mkdir(parents=True)
                for file in (NODE, "package-lock.json"):
                    shutil.copy(HERE / file, folder)
                _run("npm", "ci", "--no-audit", "--no-fund", cwd=folder, failure=failure)
            else:
                _run(sys.executable, "-m", "venv", folder, failure=failure)
                _run(
                    interpreter,
                    "-m",
                    "pip",
                    "install",
                    "-q",
                    "--no-deps",
                    "--no-compile",
                    "-r",
                    HERE / name,
                    failure=failure,
                )
            (folder / "complete").touch()
        if name == NODE:  # node finds packages from the folder of the script
            for script in HERE.glob("*.mjs"):
                shutil.copy(script, folder)
        return [interpreter, scripts]

    return install


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    port = free_port()
    with running(
        rtap_command(port, *FLAGS, *SHORT_JSON), port, "/ready", tmp_path_factory.mktemp("clients")
    ) as started:
        yield started


@pytest.fixture(scope="module")
def outcome(served, environment):
    """Results of a library's script, and how many trajectories of each policy the server then counted for it."""
    known: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}

    def trajectories() -> dict[str, float]:
        samples = served.metrics().items()
        return {
            policy: sum(value for name, value in samples if name.startswith("rtap_requests_total{policy=" + policy))
            for policy in POLICIES
        }

    def run(library: str) -> tuple[dict[str, Any], dict[str, float]]:
        if library not in known:
            kind = LIBRARIES[library].environment
            interpreter, scripts = environment(kind)
            script = Path(scripts) / f"use_{library}{'.mjs' if kind == NODE else '.py'}"
            before = trajectories()
            told = _run(interpreter, script, served.url, failure=f"{script.name} failed")
            after = trajectories()
            known[library] = json.loads(told.splitlines()[-1]), {p: after[p] - before[p] for p in POLICIES}
        return known[library]

    return run


@pytest.fixture(scope="module")
def answers(served) -> dict[str, str]:
    """Content of the answer under each policy, read from the reply itself."""

    def ask(rtap: dict[str, Any]) -> str:
        messages = [{"role": "user", "content": "make 82 from 3, 7, 25"}]
        body = {"model": "rtap", "messages": messages, "temperature": 0, "max_tokens": 400, "rtap": rtap}
        reply = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).json()
        return reply["choices"][0]["message"]["content"]

    return {policy: ask(rtap) for policy, rtap in POLICIES.items()}


@every_library
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("use", USES)
def test_use(outcome, answers, library, policy, use):
    result = outcome(library)[0][policy][use]
    assert "error" not in result, f"{result['message']}\n{result['traceback']}"
    found = result.get("text", result.get("object", result.get("arguments")))
    if "text" in result:
        assert found == answers[policy]
    else:
        assert set(found) == {"operation", "number"}
        assert found["operation"] in ("sum", "product")
        assert found["number"] in (7, 82)
    is_call = use in ("tool", "streamed_tool")
    assert result.get("name", "look_up") == "look_up"
    finish = LIBRARIES[library].called if is_call else LIBRARIES[library].answered
    assert result.get("finish", finish) == finish


@every_library
def test_a_use_is_one_request_that_carries_the_rtap_object(outcome, library):
    assert outcome(library)[1] == dict.fromkeys(POLICIES, len(USES))


@every_library
@pytest.mark.parametrize("use", ["basic", "stream"])
def test_a_wrong_field_is_the_librarys_own_error_and_names_the_field(outcome, library, use):
    result = outcome(library)[0]["wrong"][use]
    assert LIBRARIES[library].error in result["error"]
    assert "treshold" in result["message"]


@pytest.mark.parametrize("policy", POLICIES)
def test_litellm_passes_on_reasoning_usage_and_the_rtap_object_of_a_whole_reply(outcome, policy):
    results = outcome("litellm")[0][policy]
    whole, stream = results["basic"], results["stream"]
    cycles = whole["rtap"]["cycles"]
    assert whole["rtap"]["policy"] == policy
    assert whole["text"] == next(cycle["answer"] for cycle in cycles if cycle["accepted"])
    assert whole["tokens"] == sum(cycle["tokens"] for cycle in cycles)
    assert "=" in whole["reasoning"]
    assert {name: whole[name] for name in ("text", "reasoning", "tokens")} == {
        name: stream[name] for name in ("text", "reasoning", "tokens")
    }


def test_the_docs_have_the_tested_versions():
    npm = json.loads((HERE / NODE).read_text())["dependencies"]
    pinned = [(name, version) for name, version in npm.items() if name != "zod"]
    for file in (NEWEST, OPENAI_2):
        first_block = (HERE / file).read_text().split("\n\n")[0]
        pinned += re.findall(r"(?m)^([\w-]+)(?:\[\w+\])?==(.+)$", first_block)
    rows = [line for line in (ROOT / "docs" / "clients.md").read_text("utf-8").splitlines() if line.startswith("|")]
    for name, version in pinned:
        assert any(f"`{name}`" in row and version in row for row in rows), f"{name} {version}"
