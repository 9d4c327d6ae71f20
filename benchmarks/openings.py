"""Openings of a continued cycle, compared on a model that was not trained to continue: corrected and broken answers.

    python benchmarks/openings.py MODEL SAMPLES.jsonl --prompt PROMPT

Of the first sample of each question, some right and some wrong ones are continued: the prompt, the sample's text, an
opening, then up to 300 sampled tokens. ``fresh`` is the second kept sample of the same question instead. SAMPLES are
those of ``rtap eval``, PROMPT is its ``--prompt``. Writes docs/results/openings.{json,md}.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import RESULTS, interval_text, list_info, run_info, write_report

from rtap_core.answers import extract_answer, same_answer
from rtap_training.evaluation.question_files import GYM_PROMPT, SLOT, Question
from rtap_training.evaluation.records import CycleRecord, Run
from rtap_training.evaluation.samples import read_samples
from rtap_training.evaluation.statistics import Interval, paired_difference

OPENINGS = (
    "",
    "<think>",
    "\n\nWait, let me check this again step by step.\n",
    "\n\nLet me verify the answer by computing it in another way.\n",
)
FRESH = "fresh"


@dataclass(frozen=True, slots=True)
class First:
    """The first answer to a question, and the second sample."""

    question: Question
    prompt: str
    text: str
    is_right: bool
    second: CycleRecord


@dataclass(frozen=True, slots=True)
class Result:
    """A continuation, or the second sample. answer: extracted; that of the first cycle if the text is empty."""

    question: str
    opening: str
    text: str
    answer: str
    was_right: bool
    is_right: bool
    is_same: bool
    tokens: int

    @property
    def is_empty(self) -> bool:
        """True if the model ended its turn at once."""
        return not self.text.strip()


def first_answers(votes: Sequence[Run], questions: Mapping[str, Sequence[Question]], template: str) -> list[First]:
    """The first answers that ended by themselves."""
    found: list[First] = []
    for vote in votes:
        for outcome in vote.outcomes:
            question, (first, second) = questions[vote.task][outcome.index], outcome.cycles
            if first.answer is not None and first.text is not None:
                prompt = template.replace(SLOT, question.text)
                found.append(First(question, prompt, first.text, first.is_correct, second))
    return found


def some(firsts: Sequence[First], *, right: int, wrong: int) -> list[First]:
    """The first ``right`` right and ``wrong`` wrong ones."""
    return [f for f in firsts if f.is_right][:right] + [f for f in firsts if not f.is_right][:wrong]


def continued_prompts(firsts: Sequence[First], openings: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids that each first answer continues from, for each opening in turn."""
    prompts: list[list[int]] = []
    for first in firsts:
        conversation = [{"role": "user", "content": first.prompt}]
        prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        parts = [tokenizer.encode(part, add_special_tokens=False) for part in (prompt, first.text)]
        for opening in openings:
            prompts.append([*parts[0], *parts[1], *tokenizer.encode(opening, add_special_tokens=False)])
    return prompts


def result_of(first: First, opening: str, text: str, tokens: int) -> Result:
    """Result of a continuation of a first answer."""
    answer = extract_answer(text if text.strip() else first.text)
    is_right = first.question.is_right(answer)
    return Result(
        first.question.text, opening, text, answer, first.is_right, is_right, same_answer(answer, first.text), tokens
    )


def continue_answers(model: Path, firsts: Sequence[First], args: argparse.Namespace) -> list[Result]:
    """A continuation of every first answer with every opening."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    llm: Any = LLM(
        str(model), max_model_len=args.max_model_len, enforce_eager=True, enable_prefix_caching=True,
        kv_cache_memory_bytes=2**30, enable_chunked_prefill=False, max_num_batched_tokens=args.max_model_len,
        max_num_seqs=64, seed=args.seed,
    )  # fmt: skip
    prompts = continued_prompts(firsts, args.openings, llm.get_tokenizer())
    params = [
        SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed + number)
        for number in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    cases = [(first, opening) for first in firsts for opening in args.openings]
    completions = [output.outputs[0] for output in outputs]
    return [result_of(*case, c.text, len(c.token_ids)) for case, c in zip(cases, completions, strict=True)]


def mean(values: Sequence[float]) -> Interval:
    """Mean with a 95 % interval by bootstrap over questions."""
    return paired_difference(values, [0.0] * len(values))


def rows_of(results: Sequence[Result], openings: Sequence[str]) -> list[dict[str, Any]]:
    """Figures of each opening. corrected, broken: also minus those of ``fresh`` on the same questions."""
    rows: list[dict[str, Any]] = []
    of: dict[str, list[Result]] = {name: [r for r in results if r.opening == name] for name in openings}
    for name, found in of.items():
        row: dict[str, Any] = {"opening": name}
        for figure, was_right in (("corrected", False), ("broken", True)):
            changed, fresh = (
                [float(r.is_right != was_right) for r in one if r.was_right == was_right] for one in (found, of[FRESH])
            )
            row[figure] = asdict(mean(changed))
            row[f"{figure}_minus_fresh"] = asdict(paired_difference(changed, fresh))
        row["same"] = asdict(mean([float(r.is_same) for r in found]))
        row["empty"] = asdict(mean([float(r.is_empty) for r in found]))
        row["tokens"] = asdict(mean([float(r.tokens) for r in found]))
        rows.append(row)
    return rows


def to_markdown(info: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The report."""
    lines = [
        "# Openings of a continued cycle",
        "",
        "A model that was not trained to continue goes on after its first answer. Corrected: share of the wrong first "
        "answers that end right. Broken: share of the right ones that end wrong. Same: the answer of the first cycle "
        "again. An empty continuation keeps the first answer. `fresh` is another kept sample of the question instead. "
        "95 % intervals by bootstrap over questions, differences paired by question.",
        "",
        *list_info(info),
        "",
        "| opening | corrected | minus fresh | broken | minus fresh | same | empty | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = [interval_text(Interval(**row[name])) for name in ("corrected", "broken", "same", "empty")]
        differences = [
            "–" if row["opening"] == FRESH else interval_text(Interval(**row[f"{name}_minus_fresh"]), sign="+")
            for name in ("corrected", "broken")
        ]
        cells = [shares[0], differences[0], shares[1], differences[1], *shares[2:], f"{row['tokens']['value']:.0f}"]
        name = FRESH if row["opening"] == FRESH else f"`{json.dumps(row['opening'])}`"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="openings.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=Path, nargs="+")
    parser.add_argument("--prompt", default=GYM_PROMPT, help="the --prompt that the samples were made with")
    parser.add_argument("--openings", nargs="+", default=list(OPENINGS))
    parser.add_argument("--right", type=int, default=100, help="right first answers (default: 100)")
    parser.add_argument("--wrong", type=int, default=100, help="wrong first answers (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args, started = parser.parse_args(arguments), datetime.now(UTC)
    questions, votes = read_samples(args.samples, 2)
    firsts = some(first_answers(votes, questions, args.prompt), right=args.right, wrong=args.wrong)
    results = [result_of(first, FRESH, first.second.text or "", first.second.tokens) for first in firsts]
    results += continue_answers(args.model, firsts, args)
    right = sum(first.is_right for first in firsts)
    info = run_info(__file__, arguments, started, model=args.model.name, right=right, wrong=len(firsts) - right)
    rows = rows_of(results, [FRESH, *args.openings])
    content = {"setting": info, "openings": rows, "results": list(map(asdict, results))}
    write_report(args.output, "openings", content, to_markdown(info, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
