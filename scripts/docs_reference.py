"""Generate the tables of the documentation from the code: request fields, efforts, errors, settings, modules.

    python scripts/docs_reference.py            # write the tables
    python scripts/docs_reference.py --check    # exit code 1 when a table is out of date

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin

from pydantic.fields import FieldInfo

from rtap_core.errors import RtapError
from rtap_server.http.errors import STATUS, error_type
from rtap_server.http.schema import EFFORTS, RtapOptions
from rtap_server.settings import ALIASES, ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
PACKAGES = ("server", "training", "clients/python", "benchmarks", "scripts")
BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WORDS = {int: "whole number", float: "number", bool: "yes or no", str: "text", Path: "path", dict: "JSON object"}
# Defaults of optional request fields (resolve_limits in server/rtap_server/http/recursion_fields.py).
OPTION_DEFAULTS: Mapping[str, str] = {
    "policy": "`--policy`, else `confidence` with a generator and `model` without",
    "threshold": "`--threshold`, else the generator's own, else 0.5",
    "select": "`--select`, else `best` under `confidence` and `last` under the others",
    "patience": "`--patience`, else never",
    "deadline_seconds": "`--deadline-seconds`, else its ceiling",
    "return_cycles": "no",
    "drafts": "no",
}
FAILED = "Any other failure; the log has its cause under the request id"


def options_table() -> str:
    """The ``rtap`` object of a request."""
    rows: list[Sequence[str]] = []
    for name, field in RtapOptions.model_fields.items():
        default = OPTION_DEFAULTS.get(name) or f"{Settings.model_fields[name].default} (`--{_dashed(name)}`)"
        limit = Settings.model_fields.get(f"{name}_limit")
        ceiling = "" if limit is None else f"{limit.default:g} (`--{_dashed(name)}-limit`)"
        rows.append((f"`{name}`", _kind(field), field.description or "", default, ceiling))
    return _grid(("field", "value", "meaning", "default", "ceiling"), rows)


def settings_table() -> str:
    """Flags of ``rtap serve`` that vLLM does not have."""
    rows: list[Sequence[str]] = []
    for name, field in Settings.model_fields.items():
        flags = [f"`--{_dashed(name)}`", *([f"`{ALIASES[name]}`"] if name in ALIASES else [])]
        given = "" if field.default_factory is not None or field.default is None else _shown(field.default)
        rows.append((", ".join(flags), f"`{ENV_PREFIX}{name.upper()}`", _kind(field), given, field.description or ""))
    return _grid(("flag", "variable", "value", "default", "meaning"), rows)


def efforts_table() -> str:
    """Effect of each ``reasoning_effort``."""
    rows = [
        (
            f"`{word}`",
            f"× {effort.max_cycles_factor:g}" if effort.max_cycles_factor else "1",
            f"{effort.threshold_raise:.0%} of the way to 1" if effort.threshold_raise else "–",
        )
        for word, effort in EFFORTS.items()
    ]
    return _grid(("effort", "the server's `max_cycles`", "the server's `threshold` goes up by"), rows)


def errors_table() -> str:
    """Status, type, code and meaning of rtap's errors."""
    rows = [
        (
            str(status),
            f"`{error_type(status)}`",
            "null" if code is None else f"`{code}`",
            FAILED if kind is RtapError else (kind.__doc__ or "").split(". ")[0].rstrip("."),
        )
        for kind, (status, code) in STATUS.items()
    ]
    return _grid(("status", "`error.type`", "`error.code`", "when"), sorted(rows))


def modules_table() -> str:
    """Every module with the first sentence of its docstring."""
    rows = [(f"[`{path}`]({path})", _first_sentence(ROOT / path)) for path in _modules()]
    return _grid(("module", "content"), rows)


def _modules() -> Iterable[str]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py"), key=lambda p: (p.parent.parts, p.name)):
            if path.name != "__init__.py":
                yield path.relative_to(ROOT).as_posix()


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split()).replace("``", "`")
    return re.split(r"(?<=[^.]\.)\s+(?=[A-Z`*])", paragraph)[0].rstrip(".:")


TABLES: Mapping[str, Callable[[], str]] = {
    "options": options_table,
    "efforts": efforts_table,
    "errors": errors_table,
    "settings": settings_table,
    "modules": modules_table,
}


def rendered(text: str) -> str:
    """``text`` with current tables. Raises KeyError for an unknown table."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found['name']]()}\n{found[3]}", text)


def _kind(field: FieldInfo) -> str:
    """Type and bounds in words."""
    kinds = _parts(field.annotation)
    return " or ".join(word for kind in kinds for word in _words(kind)) + "".join(
        f", {bound}" for bound in _bounds(field)
    )


def _parts(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, UnionType):
        return [part for part in get_args(annotation) if part is not type(None)]
    return [annotation]


def _words(kind: Any) -> list[str]:
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return [f"`{value}`" for value in kind]
    named = WORDS.get(cast(Any, get_origin(kind) or kind))
    if named is not None:
        return [named]
    if get_args(kind) and not isinstance(get_args(kind)[0], str):  # Annotated
        return _words(get_args(kind)[0])
    return [f"`{value}`" for value in get_args(kind)]  # Literal


def _bounds(field: FieldInfo) -> Iterable[str]:
    metadata: list[Any] = [*field.metadata]
    for part in _parts(field.annotation):
        for item in get_args(part)[1:]:
            metadata += getattr(item, "metadata", [])
    for item in metadata:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤")):
            if (value := getattr(item, name, None)) is not None:
                yield f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {value:g}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return f"`{str(value).strip()}`"


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 1 with ``--check`` and a table that is out of date, else 0."""
    parser = argparse.ArgumentParser(description="Generate the tables of the documentation from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a table is out of date")
    args = parser.parse_args(argv)
    texts = {path: path.read_text("utf-8") for path in PAGES}
    stale = {path: new for path, old in texts.items() if (new := rendered(old)) != old}
    for path, new in stale.items():
        if args.check:
            print(f"{path.name} is out of date: run `python scripts/docs_reference.py`")
        else:
            path.write_text(new, "utf-8")
            print(f"wrote {path.name}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
