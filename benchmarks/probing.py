"""Whether probing a thought for its answer saves tokens on a language model: sample, probe, replay rules.

    python benchmarks/probing.py sample MODEL QUESTIONS.jsonl SAMPLES.jsonl [--questions 100] [--samples 1]
    python benchmarks/probing.py probe MODEL QUESTIONS.jsonl SAMPLES.jsonl PROBED.jsonl
    python benchmarks/probing.py replay NAME=PROBED.jsonl...

``sample`` and ``probe`` append, and skip what is there. ``replay`` writes docs/results/probing-real-model.{json,md}.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, interval_text, list_info, run_info, write_report
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rtap_core.answers import answer_key, extract_answer, same_answer
from rtap_training.evaluation.statistics import Interval, bootstrap_weights, paired_difference

PROMPT = "{question}\n\nReason briefly, step by step, and put your final answer in \\boxed{{}}."
FORCED = "\n\nThe final answer is \\boxed{"
EVERY, ANSWER_TOKENS, TEMPERATURE, MAX_TOKENS = 32, 12, 0.8, 512


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def load(model: str) -> tuple[Any, Any]:
    """Tokenizer and model, in bfloat16 on one thread."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    return tokenizer, AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()


def prompt_text(tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": PROMPT.format(question=question)}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@torch.inference_mode()
def sample(args: argparse.Namespace) -> None:
    """Whole thoughts with their answers, at the request's temperature."""
    rows = [row for row in read(args.questions_file) if row["split"] == "test"][: args.questions]
    done = {(row["id"], row["sample"]) for row in read(args.samples_file)}
    todo = [(row, s) for s in range(args.samples) for row in rows if (row["id"], s) not in done]
    tokenizer, model = load(args.model)
    ends = {model.generation_config.eos_token_id}
    for first in range(0, len(todo), args.batch):
        part, began, tokens = todo[first : first + args.batch], time.time(), 0
        torch.manual_seed(first)
        inputs = tokenizer(
            [prompt_text(tokenizer, row["question"]) for row, _ in part], return_tensors="pt", padding=True
        )
        output = model.generate(
            **inputs, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, repetition_penalty=1.0,
            max_new_tokens=MAX_TOKENS,
        )  # fmt: skip
        with args.samples_file.open("a") as file:
            for (row, s), ids in zip(part, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                length = next((n + 1 for n, i in enumerate(ids) if i in ends), len(ids))
                tokens += length
                kept = {
                    "id": row["id"], "sample": s, "answer": row["answer"], "token_ids": ids[:length],
                    "text": tokenizer.decode(ids[:length], skip_special_tokens=True),
                    "finish": "stop" if ids[length - 1] in ends else "length",
                }  # fmt: skip
                file.write(json.dumps(kept) + "\n")
        show(first + len(part), len(todo), f"{tokens / (time.time() - began):.1f} tokens/s")


def show(done: int, todo: int, more: str) -> None:
    print(time.strftime("%H:%M:%S"), done, "of", todo, more, flush=True)


@torch.inference_mode()
def probe(args: argparse.Namespace) -> None:
    """The answers after every 32 tokens of each sample, greedy and at the request's temperature."""
    questions = {row["id"]: row["question"] for row in read(args.questions_file)}
    done = {(row["id"], row["sample"]) for row in read(args.probed_file)}
    todo = [row for row in read(args.samples_file) if (row["id"], row["sample"]) not in done]
    tokenizer, model = load(args.model)
    forced = tokenizer.encode(FORCED)
    for number, row in enumerate(todo):
        began = time.time()
        prompt = tokenizer.encode(prompt_text(tokenizer, questions[row["id"]]))
        positions = range(0, len(row["token_ids"]), EVERY)
        torch.manual_seed(number)
        greedy, sampled = probes_of(tokenizer, model, prompt, row["token_ids"], positions, forced)
        row["forced_tokens"] = len(forced)
        row["probes"] = [
            {"position": p, "greedy": g, "sampled": s} for p, g, s in zip(positions, greedy, sampled, strict=True)
        ]
        with args.probed_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        show(number + 1, len(todo), f"{time.time() - began:.1f} s")


def probes_of(
    tokenizer: Any, model: Any, prompt: list[int], text: list[int], positions: Sequence[int], forced: list[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Greedy and sampled answers after each position: one row each, on the cache of the whole text.

    A row does not attend to the text after its position."""
    cache = DynamicCache()
    model(torch.tensor([[*prompt, *text[: positions[-1]]]]), past_key_values=cache, logits_to_keep=1)
    count, length = len(positions), cache.get_seq_length()
    rows = 2 * count
    cache.batch_repeat_interleave(rows)
    starts = torch.tensor([len(prompt) + p for p in positions] * 2)
    mask = (torch.arange(length)[None, :] < starts[:, None]).long()
    ids, at = torch.tensor([forced] * rows), starts[:, None] + torch.arange(len(forced))[None, :]
    found: list[list[int]] = [[] for _ in range(rows)]
    logprobs, texts, open_rows = [0.0] * rows, [""] * rows, set(range(rows))
    for _ in range(ANSWER_TOKENS):
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        logits = model(
            ids, attention_mask=mask, position_ids=at, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1].float()  # fmt: skip
        best = logits[:count].argmax(-1)
        drawn = torch.multinomial((logits[count:] / TEMPERATURE).softmax(-1), 1)[:, 0]
        ids = torch.cat([best, drawn])[:, None]
        step = logits.log_softmax(-1).gather(1, ids)[:, 0].tolist()
        for row in sorted(open_rows):
            found[row].append(int(ids[row, 0]))
            logprobs[row] += step[row]
            texts[row] = tokenizer.decode(found[row])
            if "}" in texts[row]:
                open_rows.discard(row)
        if not open_rows:
            break
        at = at[:, -1:] + 1
    probes = [
        {
            "answer": None if row in open_rows else texts[row].partition("}")[0],
            "tokens": len(found[row]),
            "logprob": round(logprobs[row], 4),
        }
        for row in range(rows)
    ]
    return probes[:count], probes[count:]


@dataclass(frozen=True, slots=True)
class Rule:
    """Stop a thought at a probe when the last ``agree`` answers are the same and the last is likely enough.

    kind: ``greedy`` or ``sampled`` probes. every: tokens between them, from ``first`` on. min_probability: of the
    answer's tokens together; 0: any."""

    kind: str
    every: int
    agree: int
    min_probability: float
    first: int

    @property
    def text(self) -> str:
        confidence = f", p ≥ {self.min_probability}" if self.min_probability else ""
        start = f", from {self.first}" if self.first > self.every else ""
        return f"{self.kind}, every {self.every}, {self.agree} agree{confidence}{start}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one sample. thought: tokens of the kept text. probes: sampled tokens of probes, and forced ones."""

    answer: str
    thought: int
    probes: int
    forced: int
    is_stopped: bool


def replay(row: Mapping[str, Any], rule: Rule) -> Outcome:
    """What the rule makes of a sample. A probe takes no time: the thought does not go on meanwhile."""
    probes = forced = 0
    answers: list[str] = []
    for one in row["probes"]:
        position = one["position"]
        if position < rule.first or position % rule.every or position == 0:
            continue
        probe = one[rule.kind]
        probes, forced = probes + probe["tokens"], forced + row["forced_tokens"]
        if probe["answer"] is None:
            answers = []
            continue
        if answers and not same_answer(answers[-1], probe["answer"]):
            answers = []
        answers.append(probe["answer"])
        if len(answers) >= rule.agree and math.exp(probe["logprob"]) >= rule.min_probability:
            return Outcome(probe["answer"], position, probes, forced, True)
    return Outcome(row["text"], len(row["token_ids"]), probes, forced, False)


RULES = [
    Rule(kind, every, agree, probability, first)
    for kind in ("greedy", "sampled")
    for every in (32, 64)
    for agree in (1, 2, 3)
    for probability in (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
    for first in (32, 96, 160)
]


# Always in the tables, whatever they gain.
SHOWN = {
    Rule(kind, every, agree, probability, 32).text
    for kind in ("greedy", "sampled")
    for every in (32, 64)
    for agree in (2, 3)
    for probability in (0.0, 0.9)
}


def per_question(rows: Sequence[Mapping[str, Any]], values: Sequence[float]) -> list[float]:
    """Mean over the samples of each question."""
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        groups.setdefault(row["id"], []).append(value)
    return [sum(group) / len(group) for group in groups.values()]


def ratio_interval(ours: Sequence[float], whole: Sequence[float]) -> Interval:
    """Sum of ours over sum of whole, with a 95 % interval by paired bootstrap over questions."""
    weights = bootstrap_weights(len(ours), seed=0)
    low, high = np.percentile((weights @ np.asarray(ours)) / (weights @ np.asarray(whole)), [2.5, 97.5])
    return Interval(sum(ours) / sum(whole), float(low), float(high))


def measure(rows: Sequence[Mapping[str, Any]], rule: Rule) -> dict[str, Any]:
    """Accuracy and tokens of one rule, against the whole samples."""
    outcomes = [replay(row, rule) for row in rows]
    right = per_question(
        rows, [float(same_answer(o.answer, row["answer"])) for o, row in zip(outcomes, rows, strict=True)]
    )
    whole_right = per_question(rows, [float(same_answer(row["text"], row["answer"])) for row in rows])
    whole = per_question(rows, [float(len(row["token_ids"])) for row in rows])
    sampled = per_question(rows, [float(o.thought + o.probes) for o in outcomes])
    thought = per_question(rows, [float(o.thought) for o in outcomes])
    difference = paired_difference(right, whole_right)
    tokens = ratio_interval(sampled, whole)
    return {
        "rule": rule.text,
        "right": sum(right) / len(right),
        "difference": asdict(difference),
        "tokens": asdict(tokens),
        "tokens_without_probes": sum(thought) / sum(whole),
        "tokens_with_forced": sum(o.thought + o.probes + o.forced for o in outcomes)
        / sum(len(row["token_ids"]) for row in rows),
        "stopped": sum(o.is_stopped for o in outcomes) / len(outcomes),
    }


def majority_right(rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[float]:
    """Of each question with eight samples: is the majority's answer right? The earliest wins a tie."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for row, answer in zip(rows, answers, strict=True):
        groups.setdefault(row["id"], []).append((answer_key(answer), row["answer"]))
    found: list[float] = []
    for group in groups.values():
        keys = [key for key, _ in group]
        found.append(float(max(keys, key=keys.count) == answer_key(group[0][1])))
    return found


def accuracy_by_position(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Share of right greedy probes after a part of the thought, of the samples that are still written then."""
    found: list[dict[str, Any]] = []
    for position in range(0, 513, 64):
        probed = [(row, one["greedy"]) for row in rows for one in row["probes"] if one["position"] == position]
        if len(probed) < 20:
            break
        right = [one["answer"] is not None and same_answer(one["answer"], row["answer"]) for row, one in probed]
        whole = [same_answer(row["text"], row["answer"]) for row, _ in probed]
        found.append(
            {
                "position": position,
                "samples": len(probed),
                "probe_right": sum(right) / len(right),
                "whole_right": sum(whole) / len(whole),
                "mean_probability": sum(math.exp(one["logprob"]) for _, one in probed) / len(probed),
            }
        )
    return found


def stable_share(rows: Sequence[Mapping[str, Any]]) -> float:
    """Tokens up to the first of the greedy probes that all give the sample's own answer, over all tokens: no rule
    that keeps every answer can end thoughts earlier."""
    total = 0
    for row in rows:
        stable = len(row["token_ids"])
        for one in reversed(row["probes"]):
            answer = one["greedy"]["answer"]
            if answer is None or not same_answer(answer, row["text"]):
                break
            stable = one["position"]
        total += stable
    return total / sum(len(row["token_ids"]) for row in rows)


def mention_share(rows: Sequence[Mapping[str, Any]]) -> float:
    """Tokens before the first mention of the sample's own answer, over all tokens. Needs no probes.

    An answer that is also an intermediate value is found too early, so this is lower than what a rule could reach."""
    before = 0.0
    for row in rows:
        text, answer = row["text"], re.escape(extract_answer(row["text"]).lstrip("-"))
        found = re.search(rf"(?<![\d.,]){answer}(?![\d])", text)
        before += len(row["token_ids"]) * (found.start() / len(text) if found else 1.0)
    return before / sum(len(row["token_ids"]) for row in rows)


def distinct(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each rule once, the cheapest first."""
    return sorted({one["rule"]: one for one in found}.values(), key=lambda one: one["tokens"]["value"])


def is_kept(found: Mapping[str, Any]) -> bool:
    """At least 20 % of the tokens saved, no accuracy lost for certain."""
    return found["tokens"]["value"] <= 0.8 and found["difference"]["high"] >= 0


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| rule | right | minus the whole thought's | tokens, probes counted | without probes | thoughts ended |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        difference, tokens = (Interval(**one[name]) for name in ("difference", "tokens"))
        cells = [
            one["rule"],
            f"{one['right']:.3f}",
            interval_text(difference, sign="+"),
            interval_text(tokens),
            f"{one['tokens_without_probes']:.3f}",
            f"{one['stopped']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def vote_of_samples(rows: Sequence[Mapping[str, Any]], rule: Rule) -> dict[str, Any] | None:
    """Accuracy of the majority of eight with and without the rule; None without eight samples of 20 questions."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["id"]] = counts.get(row["id"], 0) + 1
    rows = [row for row in rows if counts[row["id"]] >= 8 and row["sample"] < 8]
    if len(rows) < 160:
        return None
    outcomes = [replay(row, rule) for row in rows]
    right = majority_right(rows, [outcome.answer for outcome in outcomes])
    whole_right = majority_right(rows, [row["text"] for row in rows])
    sampled = per_question(rows, [float(o.thought + o.probes) for o in outcomes])
    whole = per_question(rows, [float(len(row["token_ids"])) for row in rows])
    return {
        "rule": rule.text,
        "questions": len(right),
        "right": sum(right) / len(right),
        "difference": asdict(paired_difference(right, whole_right)),
        "tokens": asdict(ratio_interval(sampled, whole)),
        "tokens_without_probes": sum(o.thought for o in outcomes) / sum(len(row["token_ids"]) for row in rows),
        "stopped": sum(o.is_stopped for o in outcomes) / len(outcomes),
    }


def report(args: argparse.Namespace) -> None:
    """Replay all rules on all files."""
    started, content, lines = datetime.now(UTC), {}, list[str]()
    for name, path in (text.split("=") for text in args.files):
        rows = read(Path(path))
        lengths = [len(row["token_ids"]) for row in rows]
        mentioned = mention_share(rows)
        if "probes" not in rows[0]:
            content[name] = {"samples": len(rows), "mean_tokens": sum(lengths) / len(rows), "mention_share": mentioned}
            lines += ["", f"## {name}: {len(rows)} samples of {sum(lengths) / len(rows):.0f} tokens, not probed", ""]
            lines += [f"The answer is first mentioned after {mentioned:.3f} of the tokens."]
            continue
        found = [measure(rows, rule) for rule in RULES]
        votes = [vote for rule in RULES if (vote := vote_of_samples(rows, rule)) is not None]
        kept = [one["rule"] for one in found if is_kept(one)]
        content[name] = {
            "samples": len(rows),
            "questions": len({row["id"] for row in rows}),
            "mean_tokens": sum(lengths) / len(rows),
            "whole_right": sum(same_answer(row["text"], row["answer"]) for row in rows) / len(rows),
            "stable_share": stable_share(rows),
            "mention_share": mentioned,
            "by_position": accuracy_by_position(rows),
            "rules": found,
            "votes": votes,
            "kept": kept,
        }
        summary = content[name]
        most = sorted(found, key=lambda one: -one["difference"]["value"])
        cheapest = sorted(found, key=lambda one: one["tokens"]["value"])
        lines += [
            "",
            f"## {name}: {summary['questions']} questions, {len(rows)} samples of {summary['mean_tokens']:.0f} tokens",
            "",
            f"Right: {summary['whole_right']:.3f}. Rules that pass: {len(kept)} of {len(RULES)}. "
            f"Greedy probes keep the sample's own answer from {summary['stable_share']:.3f} of its tokens on; "
            f"it is first mentioned after {mentioned:.3f} of them.",
            "",
            "| tokens of the thought | samples | probe right | whole right | probability of the probe |",
            "|---|---|---|---|---|",
            *(
                f"| {one['position']} | {one['samples']} | {one['probe_right']:.3f} | {one['whole_right']:.3f} | "
                f"{one['mean_probability']:.2f} |"
                for one in summary["by_position"]
            ),
            "",
            *table(distinct([*cheapest[:8], *most[:8], *(one for one in found if one["rule"] in SHOWN)])),
        ]
        if votes:
            best = sorted(votes, key=lambda one: -one["difference"]["value"])
            lines += ["", "Majority of eight:", "", *table(best[:5])]
    info = run_info(__file__, sys.argv[1:], started, seed=0)
    head = ["# Probing on a real model", "", *list_info(info)]
    write_report(args.output, "probing-real-model", {"setting": info} | content, "\n".join([*head, *lines, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("sample", sample), ("probe", probe)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("model")
        command.add_argument("questions_file", type=Path)
        command.add_argument("samples_file", type=Path)
        if name == "probe":
            command.add_argument("probed_file", type=Path)
        else:
            command.add_argument("--questions", type=int, default=100)
            command.add_argument("--samples", type=int, default=1)
            command.add_argument("--batch", type=int, default=32)
    command = commands.add_parser("replay")
    command.set_defaults(run=report)
    command.add_argument("files", nargs="+", metavar="NAME=PROBED.jsonl")
    command.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
