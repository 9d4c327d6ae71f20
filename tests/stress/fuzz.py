"""Fuzz a running server over its own /openapi.json: requests that the document allows, and such that break it.

No answer may be a 5xx, every error has OpenAI's shape and tells nothing of the server's inside, and at the end a good
request still passes. Bodies come from schemathesis; what is sent, and what is looked for in replies, is here. Exits 1
when anything was found, and prints the body that did it.
"""

import argparse
import itertools
import json
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import APIOperation, Case, GenerationMode

from rtap_server.http.route_kinds import RECURSIVE_PATHS, REFUSED_PATHS
from rtap_training.evaluation.server_process import running_server, serve_command

Operation = APIOperation[Any, Any, Any, Any]
AnyCase = Case[Any]
# What is not fuzzed, and why.
EXCLUDED: Mapping[str, str] = {
    **dict.fromkeys(REFUSED_PATHS, "closed: refused by its path, whatever the body (tests/e2e/test_bad_input.py)"),
    "/v1/systemone": "501 for every body: the model makes no structured decisions",
}
# Mode SERVED keeps what the document allows of everything else and gives a request that can be answered: without fields
# that end it before anything else is looked at (tests/server/test_caps.py), with a question, and short.
_REFUSED = (
    "chat_template", "chat_template_kwargs", "use_beam_search", "background", "previous_response_id", "prompt_embeds",
    "previous_input_messages", "messages", "input", "prompt",
)  # fmt: skip
_QUESTION = "make 82 from 3, 7, 25"
_ASKED: Mapping[str, Mapping[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": _QUESTION}]},
    "/v1/messages": {"messages": [{"role": "user", "content": _QUESTION}]},
    "/v1/completions": {"prompt": _QUESTION},
    "/v1/responses": {"input": _QUESTION},
}
_MOST: Mapping[str, int] = {"max_tokens": 64, "max_completion_tokens": 64, "max_output_tokens": 64, "n": 4}
SERVED = "served"
MODES = (GenerationMode.POSITIVE.value, GenerationMode.NEGATIVE.value, SERVED)
_LONGEST_SECONDS = 20.0  # a reply that takes longer is left, as clients do
_INSIDE = re.compile(r"0x[0-9a-f]{6,}|Traceback|File \"|/(?:tmp|usr|root|home|opt|var|proc|work|site-packages)/|\.py\b")
GOOD: Mapping[str, Any] = {"model": "rtap", **_ASKED["/v1/chat/completions"]}
_GOOD_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be, and the request that did it."""

    operation: str
    mode: str
    problem: str
    request: str


@dataclass(slots=True)
class Report:
    """replies: by operation, mode and status (``left``: it took too long; ``unsendable``: no HTTP client sends it)."""

    replies: Counter[tuple[str, str, str]] = field(default_factory=Counter[tuple[str, str, str]])
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def requests(self) -> int:
        """How many were answered."""
        return sum(n for (_, _, status), n in self.replies.items() if status.isdigit())


def fuzz(url: str, *, seconds: float, examples: int, seed: int, tell: Callable[[str], None]) -> Report:
    """Rounds over all operations until the time is up; the first is always whole, at ``examples`` a mode each."""
    report, began = Report(), time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schemathesis warns of what it cannot generate; nothing is sent then
        document: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")  # its types are generic and open
        operations: list[Operation] = [found.ok() for found in document.get_all_operations()]
        for round_ in itertools.count():
            for operation, mode in _targets(operations):
                if round_ and time.monotonic() - began > seconds:
                    return report
                _run(operation, mode, examples, hash((seed, round_)), report)
            tell(f"round {round_}: {report.requests} requests, {len(report.findings)} findings")
            if time.monotonic() - began > seconds:
                return report
    raise AssertionError("unreachable")


def _targets(operations: Sequence[Operation]) -> Iterator[tuple[Operation, str]]:
    for operation in operations:
        if operation.path not in EXCLUDED:
            modes = MODES if operation.path in RECURSIVE_PATHS else MODES[:2]
            yield from ((operation, mode) for mode in modes)


def _run(operation: Operation, mode: str, examples: int, seed: int, report: Report) -> None:
    generation = GenerationMode.POSITIVE if mode == SERVED else GenerationMode(mode)
    cases: SearchStrategy[AnyCase] = cast(Any, operation).as_strategy(generation_mode=generation)
    settings = hypothesis.settings(
        max_examples=examples, phases=[Phase.generate], database=None, deadline=None,
        suppress_health_check=cast(list[HealthCheck], list(HealthCheck)),
    )  # fmt: skip

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(case=cases)
    def each(case: AnyCase) -> None:
        if mode == SERVED:
            case.body = served(case.body, operation.path)
        _ask(case, operation.label, mode, report)

    try:
        each()
    except Unsatisfiable:  # a request without parameters has nothing to break
        report.replies[operation.label, mode, "nothing to vary"] += 1


def served(body: Any, path: str) -> Any:
    """A body that can be answered, if nothing else in it is wrong."""
    if not isinstance(body, dict):
        return body
    fields = {k: v for k, v in cast(dict[str, Any], body).items() if k not in _REFUSED}
    few = {k: max(1, min(v, most)) for k, most in _MOST.items() if isinstance(v := fields.get(k), int)}
    return {"max_tokens": 64, **fields, **few, "model": "rtap", **_ASKED[path]}


def _ask(case: AnyCase, label: str, mode: str, report: Report) -> None:
    try:
        asked: dict[str, Any] = cast(Any, case).as_transport_kwargs()
        status, headers, content = _send(asked)
    except requests.exceptions.ConnectionError as error:
        report.findings.append(Finding(label, mode, f"no answer: {type(error).__name__}", _shown(case)))
        return
    except (requests.RequestException, ValueError):  # a header with a line break, say
        report.replies[label, mode, "unsendable"] += 1
        return
    if content is None:
        report.replies[label, mode, "left"] += 1
        return
    report.replies[label, mode, str(status)] += 1
    problem = problem_of(status, headers, content)
    if problem is not None:
        report.findings.append(Finding(label, mode, f"{status}: {problem}", _shown(case)))


def _send(asked: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes | None]:
    """(status, headers, body), the body None where it took too long."""
    until, parts = time.monotonic() + _LONGEST_SECONDS, list[bytes]()
    with requests.Session() as session:
        try:
            reply = session.request(**asked, timeout=_LONGEST_SECONDS, stream=True)
            with closing(reply):
                for part in reply.iter_content(None):
                    parts.append(part)
                    if time.monotonic() > until:
                        return 0, {}, None
                return reply.status_code, reply.headers, b"".join(parts)
        except requests.exceptions.Timeout:
            return 0, {}, None


def problem_of(status: int, headers: Mapping[str, str], content: bytes) -> str | None:
    """What must not be in a reply; None where all is well."""
    if "x-request-id" not in headers:
        return "no x-request-id"
    if status < 400:
        errors = [line for line in content.splitlines() if line.startswith(b'data: {"error"')]
        return next((f"a stream failed: {line[:300]!r}" for line in errors if _code(line[6:]) >= 500), None)
    if status >= 500:
        return f"a server error: {content[:300]!r}"
    try:
        error = json.loads(content)["error"]
    except (ValueError, TypeError, KeyError):
        return f"no error object: {content[:300]!r}"
    if set(error) != {"message", "type", "param", "code"} or error["code"] != status or not error["message"]:
        return f"not OpenAI's shape: {content[:300]!r}"
    inside = _INSIDE.search(error["message"])
    return None if inside is None else f"tells of the inside ({inside[0]!r}): {error['message'][:300]!r}"


def _code(event: bytes) -> int:
    code = json.loads(event)["error"].get("code")
    return code if isinstance(code, int) else 500


def _shown(case: AnyCase) -> str:
    headers: object = cast(Any, case.headers)
    return f"{case.method} {case.formatted_path} query={case.query!r} headers={headers!r} body={case.body!r}"


def engines_of(url: str) -> dict[str, float]:
    """Which engines are up, how often they were started anew, and how many requests are being answered."""
    names = ("rtap_engine_up", "rtap_engine_restarts_total", "rtap_in_flight")
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return {f"{s.name} {s.labels.get('engine', '')}".strip(): s.value for s in samples if s.name in names}


def still_works(url: str, before: Mapping[str, float]) -> str | None:
    """Why the server is not as it was before it was fuzzed; None when it is."""
    until = time.monotonic() + _GOOD_SECONDS
    reply = httpx.post(f"{url}/v1/chat/completions", json=GOOD, timeout=_GOOD_SECONDS)
    if reply.status_code != 200 or "degraded" in reply.json()["rtap"] or not reply.json()["rtap"]["cycles"]:
        return f"a good request is answered with {reply.status_code}: {reply.text[:300]}"
    if httpx.get(f"{url}/ready").status_code != 200:
        return "it is not ready"
    while (now := engines_of(url)) != before:  # what was left is being ended
        if time.monotonic() > until:
            return f"it was {dict(before)} and is {now}"
        time.sleep(0.1)
    return None


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="fuzz.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--examples", type=int, default=25, help="of each operation and mode in a round")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--url", help="of a running server; default: one of the bundled models is started")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "rtap-fuzz-server.log")
    options = parser.parse_args(argv)
    print(f"seed {options.seed}")
    if options.url:
        return _report(options.url, options)
    with running_server(serve_command(None, None, []), log=options.log, ready_seconds=300) as url:
        return _report(url, options)


def _report(url: str, options: argparse.Namespace) -> int:
    before = engines_of(url)
    report = fuzz(url, seconds=60 * options.minutes, examples=options.examples, seed=options.seed, tell=print)
    for (operation, mode, status), count in sorted(report.replies.items()):
        print(f"{operation:45} {mode:10} {status:16} {count}")
    for finding in report.findings:
        print(f"\n{finding.operation} ({finding.mode})\n  {finding.problem}\n  {finding.request[:4000]}")
    broken = still_works(url, before)
    print(f"{report.requests} requests, {len(report.findings)} findings; {broken or 'a good request still passes'}")
    return 1 if report.findings or broken else 0


if __name__ == "__main__":
    sys.exit(main())
