"""Adaptive vote against the plain majority of as many samples, on a language model.

    python benchmarks/adaptive_vote.py MODEL QUESTIONS.jsonl

Each line of QUESTIONS has ``question`` and ``answer``, and perhaps ``split``, of which only ``test`` is asked. Rounds
of questions alternate between the rules on one server, with the same seeds. Writes
docs/results/adaptive-vote/NAME.{json,md}.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from harness import LOGS, READY_SECONDS, RESULTS, interval_text, list_info, ratio_over_rounds, run_info, write_report

from rtap_core.answers import same_answer
from rtap_training.evaluation.server_process import running_server, serve_command
from rtap_training.evaluation.statistics import mean_interval, paired_difference

PROMPT = "{question}\n\nReason briefly, step by step, and put your final answer in \\boxed{{}}."
PLAIN, ADAPTIVE, SINGLE = "plain majority", "adaptive vote", "single"


@dataclass(frozen=True, slots=True)
class Reply:
    """One answered question. samples: drawn. tokens: of all of them."""

    is_right: bool
    samples: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Round:
    """The replies of one rule to the questions of one round, in their order. seconds: of the whole round."""

    replies: tuple[Reply, ...]
    seconds: float


def rules(samples: int) -> dict[str, dict[str, Any]]:
    """The ``rtap`` field of each rule."""
    vote: dict[str, Any] = {"policy": "vote", "samples": samples}
    return {SINGLE: {"policy": "single"}, ADAPTIVE: vote, PLAIN: vote | {"threshold": 1.0}}


async def ask(client: httpx.AsyncClient, question: Mapping[str, Any], rtap: Mapping[str, Any], seed: int) -> Reply:
    """The reply to one question. Raises httpx.HTTPError."""
    body = {
        "model": "rtap",
        "messages": [{"role": "user", "content": PROMPT.format(question=question["question"])}],
        "temperature": 0.8,
        "max_tokens": 512,
        "seed": seed,
        "rtap": rtap,
    }
    response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    reply: dict[str, Any] = response.json()
    content: str = reply["choices"][0]["message"]["content"] or ""
    cycles: list[dict[str, Any]] = reply["rtap"]["cycles"]
    return Reply(same_answer(content, question["answer"]), len(cycles), sum(cycle["tokens"] for cycle in cycles))


async def run_round(url: str, questions: Sequence[Mapping[str, Any]], rtap: Mapping[str, Any], first: int) -> Round:
    """All questions at once. first: number of the first one, from which its seed follows."""
    began = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:  # noqa: S113 - the server has a deadline
        asked = [ask(client, question, rtap, 1000 * (first + n)) for n, question in enumerate(questions)]
        replies = await asyncio.gather(*asked)
    return Round(tuple(replies), time.perf_counter() - began)


def seconds_of(rounds: Sequence[Round]) -> float:
    """Of all rounds together."""
    return sum(one.seconds for one in rounds)


def tokens_of(rounds: Sequence[Round]) -> float:
    """Of all rounds together."""
    return float(sum(reply.tokens for one in rounds for reply in one.replies))


def report(found: Mapping[str, Sequence[Round]], info: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    plain = found[PLAIN]
    lines = [
        "# Adaptive vote",
        "",
        "Ratios and differences are to the plain majority of as many samples, with 95 % intervals by paired bootstrap "
        "over rounds (tokens, seconds) and questions (right).",
        "",
        *list_info(info),
        "",
        "| rule | right | right, minus the majority's | samples | tokens | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for rule, rounds in found.items():
        right = [float(reply.is_right) for one in rounds for reply in one.replies]
        of_plain = [float(reply.is_right) for one in plain for reply in one.replies]
        samples = [reply.samples for one in rounds for reply in one.replies]
        difference = interval_text(paired_difference(right, of_plain), sign="+")
        cells = [
            rule,
            interval_text(mean_interval(right)),
            "–" if rule == PLAIN else difference,
            f"{sum(samples) / len(samples):.1f}",
            *(
                "1" if rule == PLAIN else interval_text(ratio_over_rounds(figure, rounds, plain))
                for figure in (tokens_of, seconds_of)
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--limit", type=int, default=200, help="number of questions")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=8, help="questions of a round, all at once")
    parser.add_argument("--output", type=Path, default=RESULTS / "adaptive-vote")
    args, started = parser.parse_args(arguments), datetime.now(UTC)
    rows = [json.loads(line) for line in args.questions.read_text("utf-8").splitlines()]
    questions = [row for row in rows if row.get("split", "test") == "test"][: args.limit]
    flags = ["--served-model-name", "rtap", "--max-model-len", "2048", "--enforce-eager"]
    found: dict[str, list[Round]] = {rule: [] for rule in rules(args.samples)}
    name, log = args.questions.stem, LOGS / "adaptive_vote.log"
    with running_server(serve_command(str(args.model), None, flags), log=log, ready_seconds=READY_SECONDS) as url:
        for first in range(0, len(questions), args.concurrency):
            part = questions[first : first + args.concurrency]
            order = list(found) if first // args.concurrency % 2 else list(found)[::-1]
            for rule in order:
                found[rule].append(asyncio.run(run_round(url, part, rules(args.samples)[rule], first)))
            print(first + len(part), {rule: round(tokens_of(rounds)) for rule, rounds in found.items()}, flush=True)
    info = run_info(__file__, arguments, started, model=args.model.name, questions=f"{len(questions)} of {name}")
    args.output.mkdir(parents=True, exist_ok=True)
    content = {"info": info, "rounds": {rule: [asdict(one) for one in rounds] for rule, rounds in found.items()}}
    write_report(args.output, name, content, report(found, info))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
