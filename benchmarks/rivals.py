"""Recursion against majority voting, log-probabilities and optillm, under the same load on the same machine.

Three rtap servers run at once: with the generator (``single``, ``confidence``, ``model``), with log-probabilities in
place of the generator, and one of single passes for plain majorities. The last also serves optillm's proxy, so that all
rivals sample from the same policy in the same vLLM. Rules take turns on the same questions. Ratios are over a majority
of 8, with 95 % intervals by bootstrap over rounds (time, tokens) or questions (accuracy). All rules run at the first
concurrency; at the others only those of the server. Writes docs/results/rivals/rivals.{json,md}.

optillm's dependencies clash with ours: give it a separate environment, ``--optillm ENV/bin/python``.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from harness import (
    LOGS,
    MODELS,
    READY_SECONDS,
    RESULTS,
    SERVED_NAME,
    interval_text,
    list_info,
    ratio_over_rounds,
    run_info,
    write_report,
)

from rtap_training.evaluation.client import RtapServer
from rtap_training.evaluation.question_files import Question, load_questions
from rtap_training.evaluation.records import Load, RunSpec
from rtap_training.evaluation.rules import CONFIDENCE, MODEL, SINGLE, VOTE
from rtap_training.evaluation.server_process import running_server, serve_command
from rtap_training.evaluation.statistics import Interval, paired_difference, wilson_interval
from rtap_training.tasks import check

REFERENCE = "majority of 8"
# Starts optillm's proxy with the host and port that running_server appends to every command.
OPTILLM = "import sys; sys.argv = ['optillm', *sys.argv[1:]]; from optillm.server import main; main()"
MAX_TOKENS = 512  # optillm asks for 4096 by default, more than the bundled models' context
OPTILLM_APPROACHES = ("self_consistency", "bon")
POLICY, GENERATOR = str(MODELS / "policy"), str(MODELS / "confidence")
FLAGS = ["--served-model-name", SERVED_NAME, "--kv-cache-memory-bytes", str(2**30)]
LOGPROB_FLAGS = ["--confidence", "logprob", *FLAGS]
WAVES = 4  # of requests in a round: during the last one the concurrency falls


@dataclass(frozen=True, slots=True)
class Round:
    """One rule on one chunk of questions. rights: correctness of each answer, in order."""

    rights: tuple[bool, ...]
    tokens: int
    wall_seconds: float
    failed: int


@dataclass(frozen=True, slots=True)
class Row:
    """One rule at one concurrency, with ratios over the majority."""

    rule: str
    questions: int
    accuracy: Interval
    tokens: float
    seconds: float
    accuracy_difference: Interval
    tokens_ratio: Interval
    seconds_ratio: Interval
    failed: int


Rule = Callable[[Sequence[Question], int], Awaitable[Round]]
"""Answer questions at a concurrency."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write. Returns 1 when a request failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    started = datetime.now(UTC)
    questions = load_questions(sorted((MODELS / "eval" / f"{task}.jsonl") for task in args.tasks))
    with ExitStack() as stack:

        def start(name: str, command: Sequence[str], ready_path: str = "/ready") -> str:
            return stack.enter_context(
                running_server(command, log=LOGS / f"{name}.log", ready_seconds=READY_SECONDS, ready_path=ready_path)
            )

        scored = start("scored", serve_command(POLICY, GENERATOR, FLAGS))
        plain = start("plain", serve_command(POLICY, None, ["--policy", "single", *FLAGS]))
        own = start("logprob", serve_command(POLICY, None, LOGPROB_FLAGS))
        proxy = None
        if args.optillm is not None:
            os.environ["OPENAI_API_KEY"] = "none"  # optillm needs one
            proxy = start("optillm", [str(args.optillm), "-c", OPTILLM, "--base-url", f"{plain}/v1"], "/health")
        rules = _rules(scored, plain, args)
        others = _other_rules(plain, own, proxy, args)
        levels = asyncio.run(_measure(rules, others, questions, args))
    info = run_info(__file__, arguments, started, seed=args.seed)
    content = {"setting": info, "levels": [{"at": c, "task": t, "rows": list(map(asdict, r))} for c, t, r in levels]}
    write_report(args.output, "rivals", content, to_markdown(info, levels))
    return int(any(row.failed for _, _, rows in levels for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rivals.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[32, 1, 8, 64])
    parser.add_argument("--tasks", nargs="+", default=["arithmetic", "countdown"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--questions", type=int, default=128,
        help="of each task, round and rule; fewer at low concurrency",
    )  # fmt: skip
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--max-cycles", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=int, nargs="*", default=[2, 4, 16], help="sizes of further plain majorities")
    parser.add_argument(
        "--logprob-thresholds", type=float, nargs="*", default=[0.9, 0.95], help="of the logprob rule",
    )  # fmt: skip
    parser.add_argument("--optillm", type=Path, help="a Python that can import optillm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "rivals")
    return parser


def _rules(scored: str, plain: str, args: argparse.Namespace) -> dict[str, Rule]:
    """Rules compared at every concurrency, by their name in the report."""
    rules: dict[str, Rule] = {
        REFERENCE: _ours(plain, RunSpec(VOTE, samples=8), args),
        "single": _ours(scored, RunSpec(SINGLE), args),
    }
    for spec in (RunSpec(CONFIDENCE, args.threshold), RunSpec(MODEL)):
        for cycles in args.max_cycles:
            rules[f"{spec.rule}, {cycles} cycles at most"] = _ours(scored, spec, args, max_cycles=cycles)
    return rules


def _other_rules(plain: str, own: str, proxy: str | None, args: argparse.Namespace) -> dict[str, Rule]:
    """Rules compared at the first concurrency alone."""
    most = args.max_cycles[-1]
    rules = {f"majority of {count}": _ours(plain, RunSpec(VOTE, samples=count), args) for count in args.samples}
    for threshold in args.logprob_thresholds:
        spec = RunSpec(CONFIDENCE, threshold)
        rules[f"logprob {threshold:g}, {most} cycles at most"] = _ours(own, spec, args, max_cycles=most)
    if proxy is not None:
        rules |= {f"optillm {name}": _optillm(proxy, name) for name in OPTILLM_APPROACHES}
    return rules


def _ours(url: str, spec: RunSpec, args: argparse.Namespace, **load: Any) -> Rule:
    async def answer(questions: Sequence[Question], concurrency: int) -> Round:
        server = await RtapServer(url, api_key=None, timeout_seconds=300).connect()
        how = Load(concurrency, 1.0, args.seed, **load)
        run = await server.run(questions[0].task, questions, spec, how)
        return Round(
            tuple(outcome.is_correct for outcome in run.outcomes),
            sum(outcome.policy_tokens for outcome in run.answered),
            run.wall_seconds or 0.0,
            len(run.outcomes) - len(run.answered),
        )

    return answer


def _optillm(url: str, approach: str) -> Rule:
    async def answer(questions: Sequence[Question], concurrency: int) -> Round:
        rights, tokens, failed, turn = [False] * len(questions), 0, 0, iter(enumerate(questions))

        async def work(client: httpx.AsyncClient) -> None:
            nonlocal tokens, failed
            for index, question in turn:
                messages = [{"role": "user", "content": question.text}]
                try:
                    reply = await client.post(
                        "/v1/chat/completions",
                        json={"model": f"{approach}-{SERVED_NAME}", "messages": messages, "max_tokens": MAX_TOKENS},
                    )
                    content = reply.raise_for_status().json()
                    text = str(content["choices"][0]["message"]["content"]).strip()
                    tokens += int(content["usage"]["completion_tokens"])
                except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
                    failed += 1
                    continue
                rights[index] = check(question.text, text, question.answer)

        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            started = time.perf_counter()
            await asyncio.gather(*(work(client) for _ in range(concurrency)))
            return Round(tuple(rights), tokens, time.perf_counter() - started, failed)

    return answer


async def _measure(
    always: Mapping[str, Rule],
    others: Mapping[str, Rule],
    questions: Mapping[str, Sequence[Question]],
    args: argparse.Namespace,
) -> list[tuple[int, str, list[Row]]]:
    levels: list[tuple[int, str, list[Row]]] = []
    for concurrency in args.concurrency:
        rules = {**always, **others} if concurrency == args.concurrency[0] else always
        size = min(args.questions, max(16, WAVES * concurrency))
        for task, all_of_task in questions.items():
            found: dict[str, list[Round]] = {name: [] for name in rules}
            names = list(rules)
            for number in range(-1, args.rounds):  # the first round warms up, on other questions
                first = (number % (args.rounds + 1)) * size
                chunk = all_of_task[first : first + size]
                if len(chunk) < size:
                    raise SystemExit(f"{task} has no {(args.rounds + 1) * size} questions")
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    result = await rules[name](chunk, concurrency)
                    if number >= 0:
                        found[name].append(result)
            levels.append((concurrency, task, [_row(name, found[name], found[REFERENCE]) for name in rules]))
            print(f"{task}, {concurrency} at a time: done", flush=True)
    return levels


def _row(rule: str, rounds: Sequence[Round], reference: Sequence[Round]) -> Row:
    rights, others = ([right for one in each for right in one.rights] for each in (rounds, reference))
    return Row(
        rule,
        len(rights),
        wilson_interval(sum(rights), len(rights)),
        sum(one.tokens for one in rounds) / len(rights),
        sum(one.wall_seconds for one in rounds) / len(rights),
        paired_difference(list(map(float, rights)), list(map(float, others))),
        ratio_over_rounds(lambda some: sum(one.tokens for one in some), rounds, reference),
        ratio_over_rounds(lambda some: sum(one.wall_seconds for one in some), rounds, reference),
        sum(one.failed for one in rounds),
    )


def to_markdown(info: Mapping[str, Any], levels: Sequence[tuple[int, str, Sequence[Row]]]) -> str:
    """The report."""
    lines = [
        "# Recursion against majority voting, log-probabilities and optillm",
        "",
        "The same questions for every rule, in turns, on servers that run at once; every rival samples from the same "
        "policy through the same vLLM. Ratios and differences are over a plain majority of 8 samples in one request to "
        "a server without generator. logprob: the log-probabilities of the sampled tokens replace the generator; "
        "model: the policy ends its turn itself, nothing is scored. Tokens are the policy's; time is wall-clock per "
        "question. Intervals cover the rounds of one start of the servers. optillm 0.4.0 with its defaults: "
        "self_consistency draws 5 samples in sequence and clusters similar answers; bon draws 3 and lets the model "
        "rate them.",
        "",
        *list_info(info),
    ]
    for concurrency, task, rows in levels:
        lines += [
            "",
            f"## {task}, {concurrency} at a time, {rows[0].questions} questions",
            "",
            "| rule | right [95 %] | against the majority | tokens a question | of the majority's | ms a question "
            "| of the majority's time | failed |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            cells = [
                row.rule,
                interval_text(row.accuracy),
                interval_text(row.accuracy_difference, sign="+"),
                f"{row.tokens:.1f}",
                interval_text(row.tokens_ratio),
                f"{1000 * row.seconds:.0f}",
                interval_text(row.seconds_ratio),
                str(row.failed),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
