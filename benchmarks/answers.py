"""Agreement of ``rtap_core.answers`` with math-verify, on kept samples of language models.

    python benchmarks/answers.py SAMPLES.jsonl [SAMPLES.jsonl …]

The files are samples of ``rtap eval``. Compared are the samples of a question with each other and with the reference.
math-verify receives the extracted answers and runs in a process that is killed after five seconds. Writes
docs/results/answers.{json,md}.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import math_verify  # pyright: ignore  # the package has no types
from harness import RESULTS, list_info, run_info, write_report

from rtap_core.answers import extract_answer, same_answer
from rtap_training.evaluation.statistics import wilson_interval
from rtap_training.tasks.equivalence import Comparer

# Written independently of rtap_core.answers.
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_STATED = re.compile(r"answer(?: is|:)|####", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]{2,}")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two extracted answers, how often they met, and the verdicts."""

    one: str
    other: str
    count: int
    ours: bool
    math_verify: bool


@dataclass(frozen=True, slots=True)
class Agreement:
    """Verdicts on the pairs of one file. different_numbers: pairs of two numbers that only we call equal."""

    pairs: int
    distinct: int
    both: int
    only_ours: int
    only_math_verify: int
    different_numbers: int

    @property
    def precision(self) -> float:
        """Share of our equal pairs that math-verify calls equal."""
        return self.both / max(1, self.both + self.only_ours)

    @property
    def recall(self) -> float:
        """Share of math-verify's equal pairs that we call equal."""
        return self.both / max(1, self.both + self.only_math_verify)


@dataclass(frozen=True, slots=True)
class Extraction:
    """Texts whose answer is written in one way.

    as_written: the extracted answer is that of the box. last_number, ours, math_verify: right by the last number of the
    text, by the extracted answer, and by math-verify's extraction from the whole text."""

    kind: str
    texts: int
    as_written: int
    last_number: int
    ours: int
    math_verify: int


def pairs_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Samples of a question with each other, and each with the reference."""
    by_question: dict[str, list[str]] = {}
    for row in rows:
        answer = extract_answer(row["text"])
        yield answer, row["reference"]
        by_question.setdefault(row["question"], []).append(answer)
    for answers in by_question.values():
        yield from combinations(answers, 2)


def compare(found: Iterable[tuple[str, str]], comparer: Comparer) -> list[Pair]:
    """Both verdicts on each distinct pair."""
    counts = Counter(found)
    return [Pair(*pair, n, same_answer(*pair), comparer.same(*pair)) for pair, n in counts.items()]


def number_of(answer: str) -> Fraction | None:
    """The number that a plainly written answer is."""
    plain = answer.replace(",", "").replace("$", "").strip()
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


def summarise(pairs: Sequence[Pair]) -> Agreement:
    """Counts over pairs, each as often as it met."""

    def count(ours: bool, other: bool) -> int:
        return sum(p.count for p in pairs if (p.ours, p.math_verify) == (ours, other))

    numbers = [(number_of(p.one), number_of(p.other)) for p in pairs if p.ours]
    return Agreement(
        pairs=sum(p.count for p in pairs),
        distinct=len(pairs),
        both=count(True, True),
        only_ours=count(True, False),
        only_math_verify=count(False, True),
        different_numbers=sum(None not in (one, other) and one != other for one, other in numbers),
    )


def extraction(rows: Sequence[Mapping[str, Any]], comparer: Comparer) -> list[Extraction]:
    """Count texts by notation of the answer, and by the extraction that finds the right one."""
    kinds: dict[str, list[tuple[bool, bool, bool, bool]]] = {}
    for row in rows:
        text, reference = row["text"], row["reference"]
        boxes, numbers, found = _BOX.findall(text), _NUMBER.findall(text), extract_answer(text)
        kind = "box" if boxes else "stated" if _STATED.search(text) else "neither"
        as_written = not boxes or found == boxes[-1].strip()
        last = bool(numbers) and comparer.same(numbers[-1], reference)
        parse, verify = cast(Any, math_verify).parse, cast(Any, math_verify).verify
        whole = bool(verify(parse(f"${reference}$"), parse(text)))
        kinds.setdefault(kind, []).append((as_written, last, same_answer(found, reference), whole))
    return [Extraction(kind, len(rows), *map(sum, zip(*rows, strict=True))) for kind, rows in sorted(kinds.items())]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and write. Returns 1 when two different numbers count as equal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="answers.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("samples", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args, started, comparer = parser.parse_args(arguments), datetime.now(UTC), Comparer()
    pairs: dict[str, list[Pair]] = {}
    written: dict[str, list[Extraction]] = {}
    for path in args.samples:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        pairs[path.stem] = compare(pairs_of(rows), comparer)
        written[path.stem] = extraction(rows, comparer)
    comparer.close()
    agreements = {name: summarise(found) for name, found in pairs.items()}
    total = summarise([pair for found in pairs.values() for pair in found])
    info = run_info(__file__, arguments, started, timeouts=comparer.counts.timeouts, failures=comparer.counts.failures)
    differing = [pair for found in pairs.values() for pair in found if pair.ours != pair.math_verify]
    content = {
        "setting": info,
        "agreement": {name: asdict(one) for name, one in [*agreements.items(), ("all", total)]},
        "extraction": {name: list(map(asdict, rows)) for name, rows in written.items()},
        "disagreements": list(map(asdict, differing)),
    }
    write_report(args.output, "answers", content, to_markdown(info, agreements | {"all": total}, written, differing))
    return int(total.different_numbers > 0)


def to_markdown(
    info: Mapping[str, Any], agreements: Mapping[str, Agreement], written: Mapping[str, Sequence[Extraction]],
    differing: Sequence[Pair],
) -> str:  # fmt: skip
    """The report."""
    lines = [
        "# Extracted and compared answers",
        "",
        "`rtap_core.answers` against math-verify on pairs of real answers: samples of the same question, and samples "
        "with the reference. Precision: share of the pairs that `same_answer` calls equal and math-verify too. Recall: "
        "share of the pairs that math-verify calls equal and `same_answer` too, both with Wilson's 95 % interval.",
        "",
        *list_info(info),
        "",
        "| samples | pairs | distinct | equal for both | only for ours | only for math-verify | precision | recall "
        "| different numbers called equal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, a in agreements.items():
        counts = (a.pairs, a.distinct, a.both, a.only_ours, a.only_math_verify)
        shares = (_share(a.both, a.both + a.only_ours), _share(a.both, a.both + a.only_math_verify))
        lines.append(
            f"| {name} | {' | '.join(f'{n:,}' for n in counts)} | {' | '.join(shares)} | {a.different_numbers} |"
        )
    lines += [
        "",
        "## Extraction",
        "",
        'How the answer is written: in `\\boxed{}`, after "the answer is", or neither. Right: by the extracted answer, '
        "by the last number of the text, and by math-verify's own extraction from the whole text. Empty boxes are "
        "boxes too, and math-verify evaluates expressions, those of the question included.",
        "",
        "| samples | written | texts | extracted as in the last box | right, extracted | right, last number | right, "
        "math-verify |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in written.items():
        for e in rows:
            as_written = f"{e.as_written:,}" if e.kind == "box" else "–"
            right = f"{e.ours:,} | {e.last_number:,} | {e.math_verify:,}"
            lines.append(f"| {name} | {e.kind} | {e.texts:,} | {as_written} | {right} |")
    texts = sum(p.count for p in differing if max(len(_WORD.findall(text)) for text in (p.one, p.other)) >= 3)
    lines += [
        "",
        "## Disagreements",
        "",
        f"In {texts} of the {sum(p.count for p in differing)} pairs one side is a text without a final answer, in "
        "which math-verify reads some number. The others are mostly arithmetic that `rtap_core.answers` does not "
        "evaluate.",
        "",
        "| one | other | pairs | equal for |",
        "|---|---|---|---|",
    ]
    for p in sorted(differing, key=lambda p: -p.count):
        cells = (f"`{json.dumps(text[:80])[1:-1].replace('|', chr(92) + '|')}`" for text in (p.one, p.other))
        lines.append(f"| {' | '.join(cells)} | {p.count} | {'ours' if p.ours else 'math-verify'} |")
    return "\n".join(lines) + "\n"


def _share(part: int, whole: int) -> str:
    share = wilson_interval(part, whole)
    return f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
