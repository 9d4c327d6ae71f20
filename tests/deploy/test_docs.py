"""Documentation against the code: links, generated tables, the README's tree, and every command."""

import argparse
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import docs_reference
import pytest
import yaml

from rtap_core.types import Cycle, Policy, StopReason, Trajectory
from rtap_server.http.schema import cycle_object, trajectory_object
from rtap_server.settings import Settings
from rtap_training.__main__ import _parser as train_parser
from rtap_training.evaluation import calibrate, evaluate
from tests.documents import PAGES, ROOT, Command, anchors, blocks, commands, links

README = ROOT / "README.md"
ALSO_LINKED = [
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs" / "results").rglob("*.md")),
    *sorted((ROOT / "deploy").rglob("README.md")),
]

# Commands that a test executes: their first words, and the test. The first match counts.
EXECUTED: Sequence[tuple[tuple[str, ...], str]] = (
    (("curl",), "tests/e2e/test_docs.py"),
    (("rtap", "ask"), "tests/e2e/test_docs.py"),
    (("rtap", "chat"), "tests/e2e/test_docs.py"),
    (("rtap", "doctor"), "tests/e2e/test_docs.py"),
    (("python3", "deploy/compose/make_keys.py"), "tests/deploy/test_compose.py"),
    (("rtap", "train", "generator"), "tests/e2e/test_own_model.py"),
    (("rtap", "eval", "MODEL", "--confidence-model", "generator"), "tests/e2e/test_own_model.py"),
    (("make", "train", "ARGS=--smoke"), "tests/training/test_smoke.py"),
    (("promtool", "check", "rules"), "tests/deploy/test_prometheus_rules.py"),
)
# Commands that are only checked (their files, flags and targets exist), with the reason.
CHECKED: Sequence[tuple[tuple[str, ...], str]] = (
    (("make", "serve"), "installs; tests/e2e starts the same server"),
    (("make", "test"), "runs this test"),
    (("make", "test-all"), "runs this test"),
    (("make", "train"), "four hours; its stages run in tests/training/test_smoke.py"),
    (("make", "bench"), "hours"),
    (("make", "stress"), "an hour; tests/e2e/test_fuzz.py and test_soak.py do the same for less"),
    (("make", "check"), "CI runs it before the tests (.ci/run)"),
    (("make", "setup"), "installs; tests/deploy/test_setup_env.py tests it"),
    (("make", "lock"), "asks the package index; tests/deploy/test_lock.py checks its result"),
    (("make", "sbom"), "installs cyclonedx-bom"),
    (("make", "image-check"), "half an hour as root, with a Debian archive"),
    (("make", "ray-check"), "minutes on a Ray; tests/deploy/test_ray_*.py test its parts"),
    (("make", "clean"), "removes the environment of this test"),
    (("pip", "install"), "asks the package index; tests/deploy/test_wheel.py builds the wheel and imports it"),
    (("kubectl",), "needs a cluster"),
    (("helm",), "needs a cluster; tests/deploy/test_helm.py renders the chart"),
    (("ray", "start"), "leaves processes behind; make ray-check starts it"),
    (("serve", "run"), "needs that Ray; tests/deploy/test_ray_app.py reads the file"),
    (("python", "scripts/docs_reference.py"), "writes the tables that this file checks"),
    (("python", "benchmarks/"), "minutes to hours"),
    (("python", "-m", "tests.stress.fuzz"), "minutes; tests/e2e/test_fuzz.py does the same for less"),
    (("python", "-m", "pytest"), "these tests run with this one"),
    (("rtap", "serve"), "serves until it is stopped; tests/e2e starts it"),
    (("rtap", "eval"), "minutes; tests/training/test_evaluate_command.py, tests/e2e/test_own_model.py"),
    (("rtap", "calibrate"), "minutes; tests/training/test_calibrate.py"),
    (("accelerate", "launch"), "needs GPUs; tests/training/rl/test_accelerate_recipes.py reads its files"),
    (("rtap", "train"), "minutes to hours; tests/training/test_smoke.py and test_commands.py"),
    (("docker",), "needs a Docker daemon; tests/deploy/test_container.py checks the files"),
    (("tensorboard",), "serves until it is stopped; tests/training/test_smoke.py reads its files"),
    (("open-webui",), "not installed here; tests/e2e/test_docs.py checks the stream that it reads"),
)  # fmt: skip
ALL = [command for page in PAGES for command in commands(page)]


def plain(command: Command) -> tuple[str, ...]:
    """The words of a command without leading variables."""
    words = list(command.words)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return tuple(words)


def begins(words: tuple[str, ...], with_: tuple[str, ...]) -> bool:
    head = words[: len(with_)]
    return (
        len(head) == len(with_)
        and head[:-1] == with_[:-1]
        and (head[-1] == with_[-1] or (with_[-1].endswith("/") and head[-1].startswith(with_[-1])))
    )


@pytest.mark.parametrize("command", ALL, ids=lambda c: f"{c.page}: {' '.join(c.words)[:60]}")
def test_every_command_is_executed_or_checked(command: Command) -> None:
    words = plain(command)
    test = next((test for start, test in EXECUTED if begins(words, start)), None)
    if test is not None:
        assert (ROOT / test).is_file()
    else:
        assert [reason for start, reason in CHECKED if begins(words, start)], "add it to EXECUTED or CHECKED"
    check(words)


def test_no_entry_of_the_tables_is_unused() -> None:
    starts = [start for start, _ in (*EXECUTED, *CHECKED)]
    used = {next(s for s in starts if begins(plain(c), s)) for c in ALL}
    assert set(starts) - used == set()


def check(words: tuple[str, ...]) -> None:
    """The files of a command exist, and so do its flags and its make target. tests/server/test_main.py checks flags of
    `rtap serve`, which need vLLM."""
    folders = r"(?:benchmarks|deploy|docs|scripts|server|tests|training)/\S+"
    files = [w for w in words if "/" in w and re.fullmatch(folders, w)]
    assert [f for f in files if not list(ROOT.glob(f))] == []
    if words[:1] == ("rtap",) and "--" in words:  # flags of the server that is started follow
        words = words[: words.index("--")]
    match words:
        case ("make", target, *_):
            assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ("rtap", "train", *rest):
            parse(train_parser(), [w if w != "SUITE" else "suite.yaml" for w in rest], needs=("--output", "x"))
        case ("accelerate", "launch", *rest):
            parse(train_parser(), rest[rest.index("rtap_training") + 1 :], needs=("--output", "x"))
        case ("rtap", "calibrate", *rest):
            calibrate._parser().parse_args(rest)
        case ("rtap", "eval", *rest):
            parse(evaluate._parser(), rest, needs=("--questions", "x"))
        case ("python", "-m", module, *rest) if module.startswith("tests."):
            assert {w for w in rest if w.startswith("--")} - flags_of(f"{module.replace('.', '/')}.py") == set()
        case ("python", script, *rest) if script.endswith(".py"):
            assert {w for w in rest if w.startswith("--")} - flags_of(script) == set()
        case _:
            pass


def parse(parser: argparse.ArgumentParser, words: Sequence[str], *, needs: tuple[str, str]) -> None:
    """needs: a required flag and its value, added where the text only names the command."""
    more = [] if needs[0] in words or (words and words[0] not in ("study",) and needs[0] == "--output") else needs
    parser.parse_args([*words, *more])  # raises SystemExit for an unknown flag


def flags_of(script: str) -> frozenset[str]:
    """Flags in the script's text; importing it would import vLLM."""
    return frozenset(re.findall(r"\"(--[a-z-]+)\"", (ROOT / script).read_text("utf-8")))


def test_generated_tables_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert docs_reference.main(["--check"]) == 0, capsys.readouterr().out


def test_a_table_that_is_out_of_date_is_found_and_written() -> None:
    page = "before\n<!-- table: efforts -->\nold\n<!-- end -->\nafter\n"
    fresh = docs_reference.rendered(page)
    assert fresh.startswith("before\n<!-- table: efforts -->\n| effort |")
    assert fresh.endswith("<!-- end -->\nafter\n")
    assert docs_reference.rendered(fresh) == fresh
    with pytest.raises(KeyError):
        docs_reference.rendered(page.replace("efforts", "nothing"))


def test_every_table_is_on_a_page_and_has_every_setting() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert [name for name in docs_reference.TABLES if f"<!-- table: {name} -->" not in text] == []
    settings = docs_reference.settings_table()
    assert [n for n in Settings.model_fields if f"`--{n.replace('_', '-')}`" not in settings] == []
    assert settings.count("\n") == len(Settings.model_fields) + 1


def test_every_error_has_a_row() -> None:
    rows = docs_reference.errors_table().splitlines()[2:]
    assert len(rows) == len(docs_reference.STATUS)
    assert not [row for row in rows if "Base class" in row]


def test_every_field_of_the_response_is_described() -> None:
    cycle = Cycle(0, "t", "82", 0.9, True, 10, 3, 0, 20, 0, 0.1, 0.01, 0)
    whole = Trajectory(Policy.CONFIDENCE, StopReason.THRESHOLD, (cycle,), 0, "timeout", 0.1, 0.1, None, None)
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    names = {*trajectory_object(whole, with_think=True), *cycle_object(cycle, with_think=True), *StopReason}
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", [*PAGES, *ALSO_LINKED], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set[Path](), [README]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = ((page.parent / target.partition("#")[0]).resolve() for target in links(page) if "://" not in target)
        waiting += [file for file in targets if file.suffix == ".md" and file.is_file()]
    assert [page.name for page in PAGES if page not in reached] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").split()) <= 700


def test_the_tree_of_the_readme_is_that_of_the_checkout() -> None:
    tree = next(block for block in blocks(README, "") if block.startswith("server/"))
    shown, above = set[str](), ""
    for line in tree.splitlines():
        name = re.match(r" *([\w/]+)/ ", line)
        assert name is not None, line
        above = above if line.startswith(" ") else name[1]
        shown.add(f"{above}/{name[1]}" if line.startswith(" ") else name[1])
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    folders = {name.split("/")[0] for name in tracked if "/" in name and not name.startswith(".")}
    inner = {"/".join(name.split("/")[:2]) for name in tracked if name.count("/") > 1}
    assert {name for name in shown if "/" not in name} == folders
    assert {n for n in shown if "/" in n} == {n for n in inner if n.startswith(("server/", "training/"))}


def test_prometheus_accepts_the_scrape_configuration(tmp_path: Path) -> None:
    text = next(b for b in blocks(ROOT / "docs" / "observability.md", "yaml") if "scrape_configs" in b)
    assert yaml.safe_load(text)["scrape_configs"][0]["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
    if shutil.which("promtool") is None:
        pytest.skip("no promtool: apt-get install prometheus (.ci/run has it)")
    (tmp_path / "prometheus.yml").write_text(text)
    subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yml"], check=True, capture_output=True)


def test_the_litellm_proxy_has_the_settings_of_the_python_example() -> None:
    page = ROOT / "docs" / "clients.md"
    entry = yaml.safe_load(next(b for b in blocks(page, "yaml") if "model_list" in b))["model_list"][0]
    code = next(b for b in blocks(page, "python") if "litellm" in b)
    assert all(f'{name}="{value}"' in code for name, value in entry["litellm_params"].items())
