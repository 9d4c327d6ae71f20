"""Parity of policy ``single`` with plain ``vllm serve`` at temperature 0: text, finish_reason, usage and logprobs.

    python benchmarks/parity.py MODEL --questions QUESTIONS.jsonl --limit 50

Every question is sent to both servers, streaming and not, one at a time, so that both see the same batches. Every
second question asks for log-probabilities; the others are sent again with a token limit that cuts the answer. The plain
server of a model with answer tags stops at ``</answer>`` and keeps it in the text; our reasoning and content are
rendered back into a cycle and must equal it. Such models are not asked for log-probabilities: ours are only those of
the content. Writes docs/results/parity.{json,md}, with a model also its name: parity-MODEL.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from harness import (
    MODELS,
    RESULTS,
    SERVED_NAME,
    Server,
    Servers,
    comparable_servers,
    is_bundled,
    list_info,
    questions_of,
    report_name,
    run_info,
    write_report,
)

from rtap_core.format import RTAP, parse_cycle
from rtap_training.evaluation.question_files import Question

USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
TEXTS = ("reasoning", "content")


@dataclass(frozen=True, slots=True)
class Case:
    """One request to both servers."""

    question: str
    is_streamed: bool
    max_tokens: int
    with_logprobs: bool


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply. With answer tags the text is that of the cycle, else reasoning and content.

    logprobs: entries of all tokens, each with two alternatives."""

    text: tuple[str, ...]
    finish_reason: str
    usage: Mapping[str, int]
    logprobs: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """One request that the two servers answered differently."""

    case: Case
    ours: Reply
    plain: Reply


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and write. Returns 1 when any reply differs."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    started = datetime.now(UTC)
    questions = questions_of(args.questions)[: args.limit]
    generator = args.confidence_model or (MODELS / "confidence" if is_bundled(args.model) else None)
    plain_flags = ["--reasoning-parser", args.reasoning_parser] if args.reasoning_parser else []
    with (
        comparable_servers(
            args.model, confidence_model=generator, max_model_len=args.max_model_len, plain_flags=plain_flags
        ) as servers,
        httpx.Client(timeout=600) as client,
        ThreadPoolExecutor(2) as executor,
    ):
        cases = cases_of(questions, args.max_tokens, args.cut_tokens, has_logprobs=servers.format != "rtap")
        differences: list[Difference] = []
        for number, case in enumerate(cases, start=1):
            if difference := compare(executor, client, servers, case):
                differences.append(difference)
            if number % 10 == 0:
                print(f"{number} of {len(cases)} compared, {len(differences)} differ", flush=True)
        info = run_info(__file__, arguments, started, flags=" ".join(servers.flags))
    content = {"setting": info, "compared": len(cases), "differences": list(map(asdict, differences))}
    markdown = to_markdown(info, len(questions), cases, differences)
    write_report(args.output, report_name("parity", args.model), content, markdown)
    return int(bool(differences))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="parity.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=MODELS / "policy", help="default: the bundled policy")
    parser.add_argument("--confidence-model", type=Path, help="idle generator of ours; default: of the bundled policy")
    parser.add_argument("--reasoning-parser", help="of the plain server, e.g. deepseek_r1; ours always has one")
    parser.add_argument("--questions", type=Path, nargs="+", default=[], help="JSONL files; default: the bundled ones")
    parser.add_argument("--limit", type=int, default=50, help="number of questions")
    parser.add_argument("--max-tokens", type=int, default=160, help="token limit of whole answers")
    parser.add_argument("--cut-tokens", type=int, default=8, help="token limit of the cut half")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def cases_of(questions: Sequence[Question], max_tokens: int, cut_tokens: int, *, has_logprobs: bool) -> list[Case]:
    """Every question, and every second one cut, streaming and not. Cut ones and the others have log-probabilities."""
    cases: list[Case] = []
    for number, question in enumerate(questions):
        is_cut = number % 2 == 0
        for is_streamed in (False, True):
            cases.append(Case(question.text, is_streamed, max_tokens, has_logprobs and not is_cut))
            if is_cut:
                cases.append(Case(question.text, is_streamed, cut_tokens, has_logprobs))
    return cases


def compare(executor: Executor, client: httpx.Client, servers: Servers, case: Case) -> Difference | None:
    """None when both answer the same."""
    sent = [executor.submit(send, client, server, case) for server in (servers.rtap, servers.plain)]
    ours, plain = (one.result() for one in sent)
    if servers.format == "rtap":
        ours, plain = _as_cycles(ours, plain)
    return None if ours == plain else Difference(case, ours, plain)


def _as_cycles(ours: Reply, plain: Reply) -> tuple[Reply, Reply]:
    """Both replies as the text of a cycle. A cut cycle lacks its last tags: only its thought is compared."""
    whole = plain.text[1]
    if ours.finish_reason == "stop":
        texts = RTAP.render_cycle(*ours.text), whole
    else:
        texts = ours.text[0].strip(), parse_cycle(whole, RTAP)[0]
    both = zip((ours, plain), texts, strict=True)
    first, second = (Reply((text,), one.finish_reason, one.usage, one.logprobs) for one, text in both)
    return first, second


def send(client: httpx.Client, server: Server, case: Case) -> Reply:
    """The reply of one server."""
    body: dict[str, Any] = {
        "model": SERVED_NAME, "messages": [{"role": "user", "content": case.question}], "temperature": 0.0,
        "max_completion_tokens": case.max_tokens, **server.extra_body,
    }  # fmt: skip
    if server.extra_body:
        body["include_stop_str_in_output"] = True
    if case.with_logprobs:
        body |= {"logprobs": True, "top_logprobs": 2}
    url = f"{server.url}/v1/chat/completions"
    if not case.is_streamed:
        reply = client.post(url, json=body).raise_for_status().json()
        (choice,) = reply["choices"]
        return _reply([(choice["message"], choice)], reply["usage"])
    usage, parts = dict[str, int](), list[tuple[Mapping[str, Any], Mapping[str, Any]]]()
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", url, json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                usage = chunk.get("usage") or usage
                parts += [(choice["delta"], choice) for choice in chunk["choices"]]
    return _reply(parts, usage)


def _reply(parts: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], usage: Mapping[str, int]) -> Reply:
    """parts: (message, choice) of a whole reply, or (delta, choice) of each chunk."""
    logprobs: list[Mapping[str, Any]] = []
    for _, choice in parts:
        logprobs += (choice.get("logprobs") or {"content": None})["content"] or []
    return Reply(
        tuple("".join(message.get(name) or "" for message, _ in parts) for name in TEXTS),
        "".join(choice.get("finish_reason") or "" for _, choice in parts),
        {name: usage[name] for name in USAGE},
        tuple(logprobs),
    )


def to_markdown(
    info: Mapping[str, Any], questions: int, cases: Sequence[Case], differences: Sequence[Difference]
) -> str:
    """The report."""
    verdict = "all equal" if not differences else f"**{len(differences)} differ**"
    lines = [
        "# Parity of policy `single` with plain `vllm serve`",
        "",
        f"Temperature 0, {questions} questions, streaming and not, half of them also cut by a token limit: "
        f"{len(cases)} comparisons of text, finish_reason and usage, {sum(c.with_logprobs for c in cases)} of them "
        f"also of log-probabilities with two alternatives, {verdict}.",
        "",
        *list_info(info),
    ]
    for d in differences[:10]:
        how = "streamed" if d.case.is_streamed else "whole"
        lines += ["", f"`{d.case.question}` ({how}, limit {d.case.max_tokens})", ""]
        for name in ("text", "finish_reason", "usage", "logprobs"):
            ours, plain = getattr(d.ours, name), getattr(d.plain, name)
            if ours != plain:
                if name == "logprobs":
                    at = next((i for i, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), None)
                    name += f" ({len(ours)} and {len(plain)} tokens), first at {at}"
                    ours, plain = (None if at is None else one[at] for one in (ours, plain))
                lines.append(f"- {name}: ours `{ours}`, plain `{plain}`")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
