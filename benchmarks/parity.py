"""Does policy ``single`` at temperature 0 say exactly what plain ``vllm serve`` says?

Compared on every question, streaming and not: text, finish_reason and usage. The plain server gets ``</answer>`` as
stop token and keeps it in the text; our reasoning and content are rendered back into a cycle and must equal it. Half of
the questions are asked a second time with a token limit that cuts the cycle. Writes docs/results/parity.{json,md}.
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
from bench_servers import MODELS, ROOT, Servers, bench_questions, both_servers, chat_body, setting
from rich.console import Console
from rich.progress import track

from rtap_core.format import RTAP, parse_cycle
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import write_atomically

USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client gets. text: the plain server's whole text, or ours as (reasoning, content) rendered back."""

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
    """Compare and write. Result: 0, or 1 when any reply differs."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    console = Console()
    started = datetime.now(UTC)
    questions = bench_questions(args.questions)[: args.limit]
    # a cycle of the bundled models is longer than this, so that the limit binds
    cases = [(q, None) for q in questions] + [(q, args.cut_tokens) for q in questions[::2]]
    console.print("starting both servers")
    with (
        both_servers(
            model=args.model,
            confidence_model=args.confidence_model,
            max_model_len=args.max_model_len,
            logs=ROOT / "build" / "bench",
        ) as servers,
        httpx.Client(timeout=120) as client,
    ):
        differences = [
            difference
            for question, max_tokens in track(cases, "comparing", console=console, disable=not console.is_terminal)
            for is_streamed in (False, True)
            if (difference := compare(client, servers, question, max_tokens, is_streamed=is_streamed))
        ]
        described = setting(servers, [f"scripts/{Path(__file__).name}", *arguments], started)
    compared = 2 * len(cases)
    results = {"setting": described, "compared": compared, "differences": [asdict(d) for d in differences]}
    write_atomically(args.output / "parity.json", json.dumps(results, indent=1) + "\n")
    markdown = to_markdown(described, len(questions), compared, differences)
    write_atomically(args.output / "parity.md", markdown)
    console.print(markdown, markup=False, soft_wrap=True)
    return 1 if differences else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_parity.py", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=MODELS / "policy")
    parser.add_argument("--confidence-model", type=Path, default=MODELS / "confidence")
    parser.add_argument("--questions", type=Path, nargs="+", default=[], help="default: the bundled ones")
    parser.add_argument("--limit", type=int, default=50, help="questions")
    parser.add_argument("--cut-tokens", type=int, default=8, help="the limit that cuts half of them")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    return parser


def compare(
    client: httpx.Client, servers: Servers, question: Question, max_tokens: int | None, *, is_streamed: bool
) -> Difference | None:
    """None when both answer the same."""
    limit = {} if max_tokens is None else {"max_completion_tokens": max_tokens}
    ends = {"stop_token_ids": [servers.answer_close_id], "include_stop_str_in_output": True}
    ours_body = chat_body(question, None, 0.0, rtap={"policy": "single"}, **limit)
    plain_body = chat_body(question, None, 0.0, **ends, **limit)
    message, finish_reason, usage = ask(client, servers.rtap, ours_body, is_streamed=is_streamed)
    plain_message, plain_finish, plain_usage = ask(client, servers.plain, plain_body, is_streamed=is_streamed)
    plain_text = plain_message["content"]
    if finish_reason == "stop":
        ours = Reply(RTAP.render_cycle(message["reasoning"], message["content"]), finish_reason, usage)
        plain = Reply(plain_text, plain_finish, plain_usage)
    else:  # a cut cycle has not all its tags: compare what is between them
        think, _ = parse_cycle(plain_text, RTAP)
        ours = Reply(message["reasoning"].strip(), finish_reason, usage)
        plain = Reply(think, plain_finish, plain_usage)
    if ours == plain:
        return None
    return Difference(question.text, is_streamed, max_tokens, ours, plain)


def ask(
    client: httpx.Client, url: str, body: dict[str, Any], *, is_streamed: bool
) -> tuple[dict[str, str], str, dict[str, int]]:
    """(reasoning and content, finish_reason, the three counts of usage) of one chat completion."""
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


def to_markdown(described: Mapping[str, Any], questions: int, compared: int, differences: Sequence[Difference]) -> str:
    """The report."""
    verdict = "all equal" if not differences else f"**{len(differences)} differ**"
    lines = [
        "# Parity of policy `single` with plain `vllm serve`",
        "",
        f"Temperature 0, {questions} questions, streaming and not, half of them also cut by a token limit: {compared} "
        f"comparisons of text, finish_reason and usage, {verdict}.",
        "",
        *(f"- {name}: `{value}`" for name, value in described.items()),
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
