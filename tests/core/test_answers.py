"""Comparison of answers."""

from rtap_core.answers import normalise_answer


def test_spaces_and_a_final_full_stop_do_not_matter():
    assert normalise_answer(" 25 * 3 + 7. ") == normalise_answer("25*3+7")
