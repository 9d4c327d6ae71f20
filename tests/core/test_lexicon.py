"""The Oops lexicon: word boundaries, longest phrase first, counted in tokens."""

import pytest

from rtap_core.errors import ConfigError
from rtap_core.lexicon import OopsCounter, load_lexicon

LEXICON = load_lexicon()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Oops, wait. 3*4=12", ["Oops, wait"]),
        ("oops! Let me  try\nagain: 5", ["oops", "Let me  try\nagain"]),
        ("we waited in the whoops room", []),
        ("Wait for it", ["Wait"]),
        ("", []),
        ("let me check again", ["let me check again"]),
    ],
)
def test_phrases_match_on_word_boundaries(text, found):
    assert LEXICON.find(text) == found


def test_tokens_of_phrases_are_counted():
    counter = OopsCounter(LEXICON, lambda phrase: list(range(len(phrase.split()))))
    assert counter.count("Oops, wait. Let me try again. 5") == 2 + 4
    assert counter.count("12*9=108") == 0


def test_cost_is_linear_on_long_text():
    assert LEXICON.find("let me " * 100_000) == []
    assert len(LEXICON.find("oops " * 100_000)) == 100_000


@pytest.mark.parametrize("content", ["", "# version: 1\n", "oops\n"])
def test_an_unusable_file_is_refused(tmp_path, content):
    path = tmp_path / "lexicon.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match="needs a '# version: X' line and at least one phrase"):
        load_lexicon(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the Oops lexicon"):
        load_lexicon(tmp_path / "absent.txt")


def test_a_replacement_is_read(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("# version: de-1\nHoppla\n")
    lexicon = load_lexicon(path)
    assert lexicon.version == "de-1"
    assert lexicon.find("hoppla, oops") == ["hoppla"]
