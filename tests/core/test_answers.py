"""Final answers: extracted from real models' ways of writing them, and compared by value."""

import json
import re
import warnings
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.answers import answer_key, extract_answer, same_answer
from tests.costs import cpu_seconds


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("72", "72"),
        ("So she sold \\(48 + 24 = \\boxed{72}\\) clips.", "72"),
        ("First \\boxed{1}, then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("cut in the box: \\boxed{12", "12"),
        ("The answer is 72 clips in total.", "72"),
        ("The final answer is 12 - 5 = 7.", "7"),
        ("So, the final answer is \\( 25 \\).", "25"),
        ("**Answer:** $1,234.50", "1,234.50"),
        ("Add them.\n#### 42", "42"),
        ("Natalia sold 48 + 24 = 72 clips.", "72"),
        ("I first thought <answer>3</answer>, no: <answer>4</answer>", "4"),
        ("The answer is Paris.", "Paris"),
        ("A is a knight, B is a knave", "A is a knight, B is a knave"),
        ("25 * 7 + (3 - 1)", "25 * 7 + (3 - 1)"),
        ("(B) Paris has about 2,100,000 inhabitants", "(B) Paris has about 2,100,000 inhabitants"),
        ("A poem of 1802.\nI wandered lonely as a cloud", "A poem of 1802.\nI wandered lonely as a cloud"),
        ("The final answer to the problem 56 - 47 + 32 is 1.", "1"),
        ("The final answer is:\n\n1. 7 + 3 = 10", "10"),
        ("1. 75 - 21 = 54\n2. 54 + 60 = 114", "114"),
        ("So we get:\n\\[\n5 + 2 - 0 = 7\n\\]", "7"),
        ("\\begin{align*}\nthe sum &= 60 + 6\\\\\n&= 66\\end{align*}", "66"),
        ("First \\boxed{5}. Therefore the answer in \\boxed{} is 6.", "5"),
        ("x = 2\ny = 3", "x = 2\ny = 3"),
        ("", ""),
    ],
)
def test_the_final_answer_is_found(text, answer):
    assert extract_answer(text) == answer


# Whole outputs of Qwen2.5-Coder-0.5B-Instruct and SmolLM2-135M-Instruct; each answer was checked by reading.
REAL = [json.loads(line) for line in (Path(__file__).parent / "data/answers.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("row", REAL, ids=lambda row: row["answer"][:20])
def test_the_final_answer_of_a_real_output_is_found(row):
    assert extract_answer(row["text"]) == row["answer"]
    assert same_answer(row["text"], row["reference"]) == row["is_right"]


SAME = [
    (
        "1,234",
        "1234",
        "1.234 thousand",
        "1234.0",
        "$1,234.00",
        "+1234",
        "1234 apples",
        "1.234 \\times 10^{3}",
        "1{,}234",
        "1\\,234",
        "1234\\,\\text{apples}",
        "1200 + 34 = 1234",
        "x = 617 \\times 2 = 1234",
        "1.234e3",
        "\\boxed{1234}",
    ),
    ("0.5", "1/2", "50 percent", "\\frac{1}{2}", "\\dfrac12", "50%", "50 \\%", ".5", "2/4", "The answer is 0.50."),
    ("-6", "(-6)", "13 - 19 = (-6)", "$-6$"),
    ("x**2 + 3*x", "x^2+3*x", "x^{2} + 3*x", "x^2 + 3x", "x^2 + 3 \\cdot x"),
    ("-3/4", "−0.75", "-\\frac{3}{4}", "\\frac{-3}{4}", "3/-4"),
    ("1 1/2", "1.5", "1\\frac{1}{2}", "3/2", "\\boxed{1.5 square metres}"),
    ("5", "x = 5", "$5$", "\\(5\\)", "5 km", "\\text{5}", "5.", "**5**", "5^\\circ"),
    ("B", "b", "(B)", "B.", "B) Paris", "(B) Paris", "Option B", "\\text{B}", "\\textbf{(B)}"),
    ("{1, 2, 3}", "\\{3,2,1\\}", "{1,2,3,3}", "\\left\\{ 1, 2, 6/2 \\right\\}"),
    ("[1, 2)", "[1,2)", "\\left[1, 2.0\\right)"),
    ("Paris", "paris.", " PARIS "),
    ("25*7", "25 \\times 7", "25 \\cdot 7", "25 × 7"),
]
DIFFERENT = [
    ("25*7", "257"), ("1.234", "1,234"), ("12,34", "1234"), ("-5", "5"), ("50%", "50"), ("1/3", "0.333"),
    ("(1, 2)", "(2, 1)"), ("[1, 2)", "[1, 2]"), ("3^2", "32"), ("10/0", "10"), ("B", "C"), ("1e3", "13"), ("", "0"),
    ("2**3", "23"), ("x**2", "x2"), ("3 4", "34"), ("3\\;4", "34"), ("5 = x", "6 = x"), ("y = x + 1", "1"),
    ("2x", "2"), ("2x", "2y"), ("2xy", "2"), ("2\\pi", "2"), ("2\\sqrt{3}", "2"), ("5!", "5"), ("72 cents", "$72"),
    ("5 million", "5"), ("5 and a half", "5"), ("3 quarters", "3"), ("5 pm", "5 am"),
]  # fmt: skip


@pytest.mark.parametrize("group", SAME)
def test_notations_of_one_answer_count_as_equal(group):
    assert len({answer_key(text) for text in group}) == 1, {text: answer_key(text) for text in group}


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_answers_are_not_equal(one, other):
    assert not same_answer(one, other)


NUMBERS = st.integers(-(10**12), 10**12) | st.decimals(-(10**6), 10**6, places=3) | st.fractions(max_denominator=1000)
FORMS = [
    str, "{:}.".format, "\\boxed{{{}}}".format, "The answer is {}.".format, "so it must be {} apples".format,
    "$ {} $".format, "**{}**".format, "x = {}".format, "\\text{{{}}}".format,
]  # fmt: skip


@given(NUMBERS, NUMBERS, st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_numbers_are_equal_exactly_when_their_values_are(one, other, write, write_other):
    assert same_answer(write(one), write_other(other)) == (Fraction(one) == Fraction(other))


SEPARATORS = (
    "",
    "**",
    "*",
    "+",
    "-",
    "/",
    " ",
    "^",
    "^{",
    "(",
    "\\,",
    "\\;",
    "\\ ",
    "{,}",
    "\\times ",
    "\\cdot",
    ".",
    ",",
    "=",
    " = ",
)


def value_of(expression: str) -> Fraction | None:
    """The value of an expression by Python's grammar, each number exact; of an equation that of its right side."""
    for latex, python in {"\\times ": "*", "\\cdot": "*", "^": "**", "\\": " ", ",": " ", ";": " ", "{": "("}.items():
        expression = expression.replace(latex, python)
    exact = re.sub(r"\d*\.?\d+", r"F('\g<0>')", expression.rpartition("=")[2])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Fraction(eval(exact, {"F": Fraction}))
    except (SyntaxError, ValueError, ArithmeticError, TypeError):
        return None


def test_expressions_of_different_values_are_never_equal():
    """Every separator between the digits 2, 3 and 4: ``2**34`` is not ``234``."""
    values: dict[str, set[Fraction | None]] = {}
    for one, other in product(SEPARATORS, repeat=2):
        for expression in (f"2{one}3{other}1", f"-2{one}3{other}1"):
            values.setdefault(answer_key(expression), set()).add(value_of(expression))
    assert {key: found for key, found in values.items() if len(found) > 1} == {}


@given(st.integers(0, 10**15))
def test_thousands_separators_do_not_matter(number):
    assert answer_key(f"{number:,}") == answer_key(str(number))


@given(st.text(max_size=300), st.text(max_size=300))
def test_any_text_has_an_answer_and_equality_is_one(one, other):
    assert same_answer(one, one)
    assert same_answer(one, other) == same_answer(other, one)
    assert extract_answer(one) in one or extract_answer(one) == extract_answer(extract_answer(one))


HOSTILE = ["\\boxed{", "{", "(", "answer is ", "1,", "1", "a b ", "\\frac{1}", "<answer>", "1/", " ", "x=", "\\text{",
           "1 ", "the cat sat 1,000 ", "**", "- ", ".", "\\left", "9.9", "\n"]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(HOSTILE), st.integers(1, 2**19)), min_size=1, max_size=4))
def test_a_megabyte_of_anything_takes_no_time(parts):
    text = "".join(part * (count // len(part) + 1) for part, count in parts)[: 2**20]
    assert cpu_seconds(lambda: answer_key(text)) < 0.5
