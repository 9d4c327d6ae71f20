"""Written equations: which are found, which hold, and at which token their label stands."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_training.data.equations import NO_LABEL, equation_labels, equations


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("39*30=1170 39*4=157 1170+157=1327", [("39*30=1170", True), ("39*4=157", False), ("1170+157=1327", False)]),
        ("9-5=4 5-9=-4", [("9-5=4", True), ("5-9=-4", True)]),
        ("So 12 * 3 = 36. And (2+3)*4 = 21!", [("12 * 3 = 36", True), ("(2+3)*4 = 21", False)]),
        ("2+10=3*4=12", [("3*4=12", True)]),  # the right side of the first is no number
        ("1.5*2=3, 2*3=6.5, 1,000*2=2,000", []),  # no whole numbers
        ("x - 3 + 5 = 7, -3+5=2, 5 = 5, 4/0=1", []),  # rests of longer terms, no operator, no value
    ],
)
def test_an_equation_is_false_from_the_first_false_one_on(text: str, found: list[tuple[str, bool]]) -> None:
    labelled = equations(text)
    assert [holds for _, holds in labelled] == [holds for _, holds in found]
    assert all(text[:end].endswith(equation) for (end, _), (equation, _) in zip(labelled, found, strict=True))


@given(st.text("0123456789+-*/=() .,", max_size=200))
def test_any_text_is_read(text: str) -> None:
    ends = [end for end, _ in equations(text)]
    assert ends == sorted(set(ends))
    assert all(text[end - 1].isdigit() for end in ends)


def test_the_label_stands_at_the_last_token_of_its_equation() -> None:
    tokens = ["▁The", "ĠRÃ©", "Ġ", "3", "*", "4", "=", "12", "Ċ", "2+", "2=5", "Ġ7*7=4", "9,"]
    expected = dict.fromkeys(range(len(tokens)), NO_LABEL) | {7: 1, 10: 0}  # "9," goes on behind its equation
    assert equation_labels(tokens) == [*expected.values()]
