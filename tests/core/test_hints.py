"""Names that were written wrong."""

from rtap_core.hints import meant


def test_what_is_like_it_is_meant_and_nothing_else():
    known = ["--threshold", "--max-cycles"]
    assert meant("--treshold", known) == " (did you mean --threshold?)"
    assert meant("--verbose", known) == ""
    assert meant("--verbose", []) == ""
