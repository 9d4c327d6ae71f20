"""Code blocks, commands, links and anchors of the documentation."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_GENERATED = re.compile(r"<!-- table: [a-z-]+ -->.*?<!-- end -->", re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_PYTHON_FOLDERS = ("benchmarks/", "deploy/", "scripts/", "tests/")
_INLINE_COMMANDS = (
    "make ", "rtap serve", "rtap train", "rtap eval", "python -m ", *(f"python {folder}" for folder in _PYTHON_FOLDERS)
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Command:
    """A shell command. words: without its comment."""

    page: str
    text: str
    words: tuple[str, ...]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language, without their indentation in a list."""
    found = _BLOCK.finditer(page.read_text("utf-8"))
    return [re.sub(f"(?m)^{m[1]}", "", m[3]) for m in found if m[2] == language]


def commands(page: Path) -> list[Command]:
    """Commands of the page's shell blocks, then those in its text."""
    name = page.relative_to(ROOT).as_posix()
    found = [Command(name, text, words) for block in blocks(page, "sh") for text, words in _split(block)]
    prose = _GENERATED.sub("", _BLOCK.sub("", page.read_text("utf-8")))
    inline = (" ".join(m[1].split()) for m in _INLINE.finditer(prose))
    return found + [Command(name, t, tuple(shlex.split(t))) for t in inline if t.startswith(_INLINE_COMMANDS)]


def _split(block: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Commands of a block. A backslash or an open quote continues a line; ``&&`` separates commands."""
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
    assert not text, f"unterminated command: {text!r}"


def links(page: Path) -> list[str]:
    """Targets of links and images outside blocks of code."""
    return sorted(set(_LINK.findall(_BLOCK.sub("", page.read_text("utf-8")))))


def anchors(page: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", _BLOCK.sub("", page.read_text("utf-8")), re.MULTILINE):
        words = re.sub(r"[`*]", "", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-"))
    return found
