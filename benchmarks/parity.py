"""Parity of policy ``single`` with plain ``vllm serve`` at temperature 0: text, finish_reason and usage.

Every question is sent to both servers, streaming and not. The plain server stops at ``</answer>`` and keeps it in the
text; our reasoning and content are rendered back into a cycle and must equal it. Half of the questions are sent again
with a token limit that cuts the cycle. Writes docs/results/parity.{json,md}.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
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
    list_info,
    questions_of,
    run_info,
    write_report,
)

from rtap_core.format import RTAP, parse_cycle
from rtap_training.evaluation.question_files import Question

USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclass(frozen=True, slots=True)
class Reply:
    """text: the plain server's whole text, or our reasoning and content rendered back into a cycle."""

    text: str
    finish_reason: str
    usage: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Difference:
    """One request that the two servers answered differently."""

    question: str
    is_streamed: bool
    max_tokens: int | None
    ours: Reply
    plain: Reply


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and write. Returns 1 when any reply differs."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    started = datetime.now(UTC)
    questions = questions_of(args.questions)[: args.limit]
    # A cycle of the bundled models is longer than cut_tokens.
    cases = [(q, None) for q in questions] + [(q, args.cut_tokens) for q in questions[::2]]
    with (
        comparable_servers(
            args.model, confidence_model=args.confidence_model, max_model_len=args.max_model_len
        ) as servers,
        httpx.Client(timeout=120) as client,
    ):
        differences = [
            difference
            for question, max_tokens in cases
            for is_streamed in (False, True)
            if (difference := compare(client, servers, question, max_tokens, is_streamed=is_streamed))
        ]
        info = run_info(__file__, arguments, started, flags=" ".join(servers.flags))
    compared = 2 * len(cases)
    content = {"setting": info, "compared": compared, "differences": list(map(asdict, differences))}
    write_report(args.output, "parity", content, to_markdown(info, len(questions), compared, differences))
    return int(bool(differences))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="parity.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODELS / "policy")
    parser.add_argument("--confidence-model", type=Path, default=MODELS / "confidence")
    parser.add_argument("--questions", type=Path, nargs="+", default=[], help="JSONL files; default: the bundled ones")
    parser.add_argument("--limit", type=int, default=50, help="number of questions")
    parser.add_argument("--cut-tokens", type=int, default=8, help="token limit of the cut half")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def compare(
    client: httpx.Client, servers: Servers, question: Question, max_tokens: int | None, *, is_streamed: bool
) -> Difference | None:
    """None when both answer the same."""
    limit = {} if max_tokens is None else {"max_completion_tokens": max_tokens}
    kept = {"include_stop_str_in_output": True} if servers.plain.extra_body else {}
    message, finish_reason, usage = send(client, servers.rtap, question, limit, is_streamed=is_streamed)
    plain_message, plain_finish, plain_usage = send(
        client, servers.plain, question, limit | kept, is_streamed=is_streamed
    )
    plain_text = plain_message["content"]
    if finish_reason == "stop":
        ours = Reply(RTAP.render_cycle(message["reasoning"], message["content"]), finish_reason, usage)
        plain = Reply(plain_text, plain_finish, plain_usage)
    else:  # a cut cycle lacks its last tags: compare the text between them
        think, _ = parse_cycle(plain_text, RTAP)
        ours = Reply(message["reasoning"].strip(), finish_reason, usage)
        plain = Reply(think, plain_finish, plain_usage)
    if ours == plain:
        return None
    return Difference(question.text, is_streamed, max_tokens, ours, plain)


def send(
    client: httpx.Client, server: Server, question: Question, fields: Mapping[str, Any], *, is_streamed: bool
) -> tuple[dict[str, str], str, dict[str, int]]:
    """(reasoning and content, finish_reason, usage) of one chat completion."""
    body: dict[str, Any] = {
        "model": SERVED_NAME, "messages": [{"role": "user", "content": question.text}], "temperature": 0.0,
        **server.extra_body, **fields,
    }  # fmt: skip
    url = server.url
    message = {"reasoning": "", "content": ""}
    if not is_streamed:
        reply = client.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()
        choice = reply["choices"][0]
        message |= {name: choice["message"].get(name) or "" for name in message}
        return message, choice["finish_reason"], {name: reply["usage"][name] for name in USAGE}
    finish_reason, usage = "", dict[str, int]()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("usage"):
                usage = {name: chunk["usage"][name] for name in USAGE}
            for choice in chunk["choices"]:
                for name in message:
                    message[name] += choice["delta"].get(name) or ""
                finish_reason = choice.get("finish_reason") or finish_reason
    return message, finish_reason, usage


def to_markdown(info: Mapping[str, Any], questions: int, compared: int, differences: Sequence[Difference]) -> str:
    """The report."""
    verdict = "all equal" if not differences else f"**{len(differences)} differ**"
    lines = [
        "# Parity of policy `single` with plain `vllm serve`",
        "",
        f"Temperature 0, {questions} questions, streaming and not, half of them also cut by a token limit: {compared} "
        f"comparisons of text, finish_reason and usage, {verdict}.",
        "",
        *list_info(info),
    ]
    for d in differences[:10]:
        how = "streamed" if d.is_streamed else "whole"
        lines += [
            "",
            f"`{d.question}` ({how}, limit {d.max_tokens})",
            "",
            f"- ours: `{d.ours}`",
            f"- plain: `{d.plain}`",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
