"""Extract the final answer from an answer's text, and compare answers.

``extract_answer`` finds the final answer in a text: answer tags, the last ``\\boxed{}``, "the answer is …", the last
number of the last line, or the right side of the equation there, else the whole text. ``answer_key`` maps equal answers
to equal keys, whatever their notation.
Model output is hostile input: both take linear time and evaluate nothing.
"""

import re
from fractions import Fraction
from itertools import islice

_TAIL = 4096  # characters at the end of a text in which its final answer is searched
_MAX_DIGITS = 200  # a longer number is compared as text
_MAX_KEY = 2000  # characters of a text compared

_ANSWER_TAG = re.compile(r"<answer>([^<]*)</answer>", re.IGNORECASE)
_STATED = re.compile(r"(?:\banswer(?:(?: (?:to|of|for|in) [^\n]{0,100}?)? is\b|:)|####)[ \t*:]*", re.IGNORECASE)
_ENUMERATED = re.compile(r"\d{1,2}\.[ \t]+(?=\S)")
_MARKUP = re.compile(r"\\[\])]|\\end\{\w{1,20}\*?\}")
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_FRACTION = rf"(?:{_DIGITS})(?:\s?/\s?(?:{_DIGITS}))?"
_IN_TEXT = re.compile(rf"(?<![\w.])(?:(?<!\d )[-−])?[$€£]?(?:{_FRACTION})\s?%?(?![\w.]*\d)")
_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}")
_MIN_WORDS = 3  # of a sentence; a text with fewer is an answer by itself

_WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_FRAC = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_POWER = re.compile(r"(?<=[\w)\]}])\*\*(?=[\w({+-])")
_EXPONENT = re.compile(r"\^\{(\w+)\}")
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!]|\{,\})(?=\d{3})")
_SPACE = re.compile(r"\\(?:[,;: ]|quad|qquad)")
_NOISE = re.compile(r"\\(?:left|right|!|displaystyle|circ|degree|\(|\)|\[|\])|\^\{?\\circ\}?|[$`°]")
_LATEX_WORDS = {
    r"\times": "×",
    r"\cdot": "×",
    "**": "",
    "*": "×",
    r"\div": "/",
    r"\%": "%",
    r"\{": "{",
    r"\}": "}",
    r"\$": "",
    r"\pi": "π",
}
_MATH = re.compile(r"\\[()\[\]]")
_ARITHMETIC = re.compile(r"[^<>!≠≤≥≈A-Za-z]+")
_ASSIGNED = re.compile(r"^[A-Za-z]\w?\s*=\s*((?:[^=<>!≠≤≥≈A-Za-z]+=)*[^=]+)$")
_DIGIT = re.compile(r"\d")
_CHOICE = re.compile(
    r"^(?:(?:option|choice|answer)\s+)?(?:\(([a-j])\)|([a-j])[).:])(?=\s|$)|^(?:option|choice)\s+([a-j])$"
)
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# Words after a number that change its value. Other words are units: "72 clips", "5 square metres".
_NOT_UNITS = (
    "and|or|to|plus|minus|times|over|by|mod|squared|cubed|point|pi|hal(?:f|ves)|thirds?|quarters?|fourths?|fifths?|tenths?|"
    "percent|cents?|am|pm|o|" + "|".join(_SCALES)
)
_UNIT_WORD = rf"\s(?!(?:{_NOT_UNITS})\b)[^\W\d_]"
_UNIT = rf"(?:{_UNIT_WORD}{{2,}}(?:{_UNIT_WORD}+){{0,3}}|(?:[kcm]?m|k?g|mg|ml|mph))?"
_NUMBER = re.compile(
    rf"^([-+]?)\s?[€£]?({_DIGITS})(?:\s?(?:e|×\s?10\s?\^)\s?\{{?([-+]?\d{{1,3}})\}}?)?"
    rf"(?:\s({'|'.join(_SCALES)}))?(?:\s?(%)|\s(percent))?{_UNIT}$"
)
_RATIO = re.compile(rf"^([-+]?)\s?({_DIGITS})\s?/\s?([-+]?)({_DIGITS}){_UNIT}$")
_MIXED = re.compile(r"^([-+]?)\s?(\d+) (\d+)\s?/\s?(\d+)$")
_LOOSE_SPACE = re.compile(r"\s+(?=\W)|(?<=\W)\s+")
_COEFFICIENT = re.compile(r"(?<=\d)×(?=[a-z])")  # 3×x is 3x
_LIST = re.compile(r"^([\[({])(.*)([\])}])$", re.DOTALL)


def extract_answer(text: str) -> str:
    """The final answer in the text of an answer. A text that is only an answer is returned unchanged."""
    text = text.strip()
    tail = text[-_TAIL:].replace("\\boxed{}", "")
    tags = _ANSWER_TAG.findall(tail)
    if tags and tags[-1].strip():
        return extract_answer(tags[-1])
    if (found := _boxed(tail) or _stated(tail)) is not None:
        return found
    if _CHOICE.match(_plain(text[:_MAX_KEY])):
        return text
    line = _last_line(tail)
    if not _is_sentence(tail):
        return _right_side(line) or text
    numbers = _IN_TEXT.findall(line)
    return numbers[-1].strip() if numbers else text


def _last_line(text: str) -> str:
    """The last line that is more than the end of a formula."""
    while True:
        text = text.rstrip(" \n\t$*_.")
        start = max(text.rfind("\\", len(text) - 30), 0)
        if not _MARKUP.fullmatch(text, start):
            return text.rpartition("\n")[2]
        text = text[:start]


def _right_side(text: str) -> str:
    """The value of an arithmetic equation: 8 of ``3 + 5 = 8``. Empty if the text is none."""
    left, _, right = text.rpartition("=")
    return right.strip() if _ARITHMETIC.fullmatch(left) and _DIGIT.search(right) else ""


def _is_sentence(text: str) -> bool:
    return next(islice(_WORD.finditer(text), _MIN_WORDS - 1, None), None) is not None


def _boxed(text: str) -> str | None:
    """Contents of the last ``\\boxed{}``; of an unclosed one, its line."""
    _, found, rest = text.rpartition("\\boxed{")
    if not found:
        return None
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:i].strip() or None
    return rest.partition("\n")[0].strip() or None


def _stated(text: str) -> str | None:
    """The answer of the last "the answer is …": its number if it has one, else the rest of the sentence."""
    starts = [match.end() for match in _STATED.finditer(text)]
    if not starts:
        return None
    rest = text[starts[-1] :]
    if rest.startswith("\n"):
        rest = _ENUMERATED.sub("", rest.lstrip("\n* \t"), count=1)
    end = _SENTENCE_END.search(rest)
    sentence = rest[: end.start()] if end else rest
    sentence = _MATH.sub("", sentence.rpartition("=")[2]).strip(" \t*_`$")
    numbers = _IN_TEXT.findall(sentence) if _is_sentence(sentence) else ()
    return numbers[0].strip() if numbers else sentence or None


def answer_key(text: str) -> str:
    """Key under which answers count as equal.

    Equal are numbers of one value, whatever their unit (``0.5``, ``1/2``, ``50 %``), sets in any order, lists and
    intervals element by element, choice letters with and without their text, and texts that differ in letter case,
    white space, LaTeX wrappers or a final full stop. Different numbers never are."""
    return _key(extract_answer(text)[:_MAX_KEY])


def same_answer(one: str, other: str) -> bool:
    """True if two answers count as equal."""
    return answer_key(one) == answer_key(other)


def _key(answer: str) -> str:
    plain = _plain(answer)
    if (choice := _CHOICE.match(plain)) is not None:
        return next(filter(None, choice.groups()))
    if (parts := _LIST.match(plain)) is not None:
        opening, inside, closing = parts.groups()
        if opening + closing in ("()", "{}") and (value := _value(inside.strip())) is not None:
            return str(value)
        keys = [_element_key(part) for part in inside.split(",")]
        if opening == "{" and closing == "}":
            keys = sorted(set(keys))
        return f"{opening}{','.join(keys)}{closing}"
    return _element_key(plain)


def _element_key(text: str) -> str:
    value = _value(text.strip())
    return _COEFFICIENT.sub("", _LOOSE_SPACE.sub("", text.strip())) if value is None else str(value)


def _plain(answer: str) -> str:
    """The answer without LaTeX wrappers, in lower case, with plain signs."""
    text = _SPACE.sub(" ", _THOUSANDS.sub("", _POWER.sub("^", answer.strip())))
    for latex, plain in _LATEX_WORDS.items():
        text = text.replace(latex, plain)
    text = _WRAPPER.sub(r"\1", text)
    text = _FRAC.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text)
    text = _EXPONENT.sub(r"^\1", _NOISE.sub("", text)).replace("−", "-").replace("–", "-").strip()
    text = " ".join(text.split())  # runs of spaces would make the next two quadratic
    assigned = _ASSIGNED.match(text)
    text = assigned[1] if assigned is not None else text
    text = _right_side(text) or text
    return " ".join(text.split()).removesuffix(".").strip().casefold()


def _value(plain: str) -> Fraction | None:
    """The number that an answer is, exactly; None if it is not one."""
    if len(plain) > _MAX_DIGITS:
        return None
    if (match := _NUMBER.match(plain)) is not None:
        sign, digits, exponent, scale, percent, in_words = match.groups()
        value = Fraction(digits.replace(",", "")) * Fraction(10) ** int(exponent or 0) * _SCALES.get(scale, 1)
        return (-value if sign == "-" else value) / (100 if percent or in_words else 1)
    if (match := _MIXED.match(plain)) is not None:
        sign, whole, above, below = match.groups()
        value = int(whole) + Fraction(int(above), int(below)) if int(below) else None
        return None if value is None else -value if sign == "-" else value
    if (match := _RATIO.match(plain)) is not None:
        sign, above, sign_below, below = match.groups()
        divisor = Fraction(below.replace(",", ""))
        if not divisor:
            return None
        value = Fraction(above.replace(",", "")) / divisor
        return -value if (sign == "-") != (sign_below == "-") else value
    return None
