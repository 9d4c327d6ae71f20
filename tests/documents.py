"""README and docs as tests read them: their blocks of code, the commands in those, their links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_GENERATED = re.compile(r"<!-- table: [a-z-]+ -->.*?<!-- end -->", re.DOTALL)  # the code's own words
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_INLINE_COMMANDS = ("make ", "rtap serve", "rtap train", "rtap eval", "python scripts/", "python -m ")


@dataclass(frozen=True, slots=True)
class Command:
    """One command as it is written. words: without its comment."""

    page: str
    text: str
    words: tuple[str, ...]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language, without the indent of a list."""
    found = _BLOCK.finditer(page.read_text("utf-8"))
    return [re.sub(f"(?m)^{m[1]}", "", m[3]) for m in found if m[2] == language]


def commands(page: Path) -> list[Command]:
    """Of the page's shell blocks, and those that its sentences name."""
    name = page.relative_to(ROOT).as_posix()
    found = [Command(name, text, words) for block in blocks(page, "sh") for text, words in _split(block)]
    prose = _GENERATED.sub("", _BLOCK.sub("", page.read_text("utf-8")))
    inline = (" ".join(m[1].split()) for m in _INLINE.finditer(prose))
    return found + [Command(name, t, tuple(shlex.split(t))) for t in inline if t.startswith(_INLINE_COMMANDS)]


def _split(block: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Whole commands: a line that ends in a backslash or inside quotes goes on; ``&&`` is between two."""
    text = ""
    for line in block.splitlines():
        text = f"{text}\n{line}" if text else line
        if text.endswith("\\"):
            continue
        try:
            words = shlex.split(text.replace("\\\n", " "), comments=True)
        except ValueError:  # inside quotes
            continue
        for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
            if part:
                yield text.strip(), tuple(shlex.split(part))
        text = ""
    assert not text, f"a command without end: {text!r}"


def links(page: Path) -> list[str]:
    """Targets of links and images outside blocks of code."""
    return sorted(set(_LINK.findall(_BLOCK.sub("", page.read_text("utf-8")))))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", _BLOCK.sub("", page.read_text("utf-8")), re.MULTILINE):
        words = re.sub(r"[`*]", "", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-"))
    return found
