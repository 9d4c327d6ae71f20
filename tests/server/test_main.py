"""Command-line mistakes of `rtap serve` that are found before anything is loaded: exit code 2 and one sentence."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rtap_core.artifact import Artifact
from rtap_core.format import RTAP, TEXT, THINK
from rtap_core.types import Policy
from rtap_server import command_line
from rtap_server.__main__ import _parse, main
from rtap_server.command_line import check
from rtap_server.engine.vllm_compat import vllm_flags
from rtap_server.routes.rtap import server_facts, start_lines
from rtap_server.settings import GROUPS, REMOVED, Settings
from tests.costs import child_cpu_seconds
from tests.documents import PAGES, commands
from tests.server.fake_engine import FakeEngine, build


@pytest.mark.parametrize(
    ("flags", "environ", "sentence"),
    [
        (["--threshold", "2"], {}, "--threshold (or RTAP_THRESHOLD)='2'"),
        (["--policy", "confidence"], {}, "policy=confidence needs a generator"),
        (["--policy", "sure"], {}, "--policy (or RTAP_POLICY)='sure'"),
        ([], {"RTAP_TRESHOLD": "1"}, "unknown variables: RTAP_TRESHOLD (did you mean RTAP_THRESHOLD?); fix or unset"),
        (["--confidence", "remote", "--confidence-model", "org/m"], {}, "confidence=remote needs a http(s) address"),
        (["--api-server-count", "2"], {}, "rtap runs one API process"),
        (["--headless"], {}, "rtap runs one API process"),
        (["--api-key", "secret"], {}, "leave out --api-key, which other users of this machine can read"),
        (["--api-keys-file", "/nowhere/keys"], {}, "cannot read the API keys file /nowhere/keys: No such file"),
        ([], {"RTAP_API_KEYS": ","}, "RTAP_API_KEYS must be keys of printable ASCII"),
        (["--reasoning-parser", "qwen3"], {}, "leave out --reasoning-parser qwen3"),
        (
            ["--chat-template", "/nowhere.jinja"],
            {},
            "The supplied chat template string (/nowhere.jinja) appears path-like",
        ),
    ],
)
def test_mistakes_are_one_sentence(flags, environ, sentence, monkeypatch, capsys):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["some/model", *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rtap serve: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert "secret" not in lines[0]


@pytest.mark.parametrize("flag", REMOVED)
def test_a_removed_flag_is_refused_with_its_sentence(flag, capsys):
    assert main(["some/model", flag, "1"]) == 2
    assert f"rtap serve: {flag} was removed: {REMOVED[flag]}\n" in capsys.readouterr().err


def test_a_flag_that_is_written_wrong_gets_the_right_one(capsys):
    assert main(["some/model", "--treshold", "0.4"]) == 2
    assert (
        "unrecognized arguments: --treshold (did you mean --threshold?); `rtap serve --help`" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["/nowhere", "--threshold", "2"], "no model at /nowhere"),
        (["--threshold", "2", "/nowhere"], "--threshold (or RTAP_THRESHOLD)='2'"),
        (["--port", "eighty", "--policy", "sure"], "--port must be a number from 0 to 65535, not 'eighty'"),
        (["--policy", "sure", "--port", "eighty"], "--policy (or RTAP_POLICY)='sure'"),
        (["--tensor_parallel_size", "2", "--max-cycles", "0"], "--max-cycles (or RTAP_MAX_CYCLES)='0'"),
        (["--thresh", "2"], "--threshold (or RTAP_THRESHOLD)='2'"),
        (["--confidence-model", "/nowhere"], "no generator at /nowhere"),
        (["--confidence-config", "/nowhere"], "cannot read --confidence-config /nowhere: No such file"),
        (["--confidence-engine-args", "{"], "--confidence-engine-args is not JSON"),
        (["--threshold"], "--threshold needs a value"),
        (["--config", "/nowhere.yaml"], "cannot read --config /nowhere.yaml: No such file"),
        (["a/b", "c/d"], "unrecognized argument 'c/d': 'a/b' is the MODEL already"),
    ],
)
def test_the_first_mistake_of_a_command_line_is_reported(words, sentence, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"rtap serve: {sentence}")


@pytest.mark.parametrize(
    ("words", "code"), [(["/nowhere"], 2), (["--threshold", "2"], 2), (["--treshold", "2"], 2), (["--help"], 0)]
)
def test_mistakes_and_help_import_nothing_heavy_and_take_less_than_two_seconds(words, code):
    program = (
        "import sys; from rtap_server.__main__ import main; code = main(sys.argv[1:]); "
        "assert not {'vllm', 'torch', 'transformers'} & sys.modules.keys(); sys.exit(code)"
    )

    def run() -> None:
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr

    assert child_cpu_seconds(run) < 2


@pytest.mark.parametrize(
    "words",
    [
        ["--lora-modules", "a=/a", "b=/b", "--enable-lora"],
        ["-tp", "2", "-O3", "--no-enable-prefix-caching", "--seed=-1"],
        ["--compilation-config.mode", "3", "--hf-overrides", "{}", "--host", "127.0.0.1", "--port", "0"],
        ["--verbose", "--max_cycles=3", "--deadline", "5"],
    ],
)
def test_correct_command_lines_pass_the_check(words):
    assert check(["some/model", *words], {}) is not None


def test_the_listed_flags_are_those_of_the_installed_vllm():
    assert vllm_flags() == json.loads(Path(command_line.__file__).with_name("vllm_flags.json").read_text("utf-8"))


def test_every_setting_is_in_one_group_of_the_help():
    grouped = [name for _, names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(Settings.model_fields)


def test_help_lists_our_groups_with_choices_and_defaults_then_those_of_vllm(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    titles = [f"{title}:" for title in GROUPS] + ["vLLM's groups", "  ParallelConfig"]
    assert [text.index(f"\n{title}") for title in titles] == sorted(text.index(f"\n{title}") for title in titles)
    assert "--policy {confidence,model,single,vote}" in text
    assert "--log-format {text,json}" in text
    assert "default for max_cycles of a request [8]" in text
    assert main(["--help=limits"]) == 0
    text = capsys.readouterr().out
    assert "--n-limit" in text
    assert "--threshold" not in text
    with pytest.raises(SystemExit) as left:
        main(["--help=ParallelConfig"])
    assert left.value.code == 0
    assert "--tensor-parallel-size" in capsys.readouterr().out


def test_every_flag_of_the_documents_is_known():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    theirs = make_arg_parser(FlexibleArgumentParser())._option_string_actions
    ours = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    serving = [c.words for page in PAGES for c in commands(page) if "serve" in c.words and "rtap" in c.words]
    assert len(serving) > 5
    assert {w.partition("=")[0] for words in serving for w in words if w.startswith("--")} - ours - set(theirs) == set()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], ["rtap"]),
        (["some/model"], ["rtap", "some/model"]),
        (["some/model", "--served-model-name", "mine", "also"], ["mine", "also"]),
        (["some/model", "--enable-lora", "--lora-modules", "rtap=/a"], ["some/model"]),
    ],
)
def test_a_model_is_called_rtap_and_by_its_own_name(flags, names, monkeypatch):
    monkeypatch.setattr("os.environ", dict(os.environ))
    assert _parse(flags)[0].served_model_name == names


@pytest.mark.parametrize(
    ("settings", "confidence", "fmt", "policy", "source"),
    [
        (
            Settings(), None, TEXT,
            "model (one turn, as with plain vLLM), the default without a confidence source; --policy vote, or "
            '"rtap": {"policy": "vote"} in a request, votes adaptively',
            "none, so no answer is scored; --confidence-model (a generator of `rtap train generator`) or --confidence "
            "logprob (no second model; `rtap calibrate` fits it) adds scores and policy confidence",
        ),
        (
            Settings(policy=Policy.VOTE), None, THINK,
            "vote (up to 8 samples, until the leading answer's probability reaches 0.85), set by --policy",
            "none, so no answer is scored",
        ),
        (
            Settings(confidence_model="/generator", threshold=0.7), object(), RTAP,
            "confidence (up to 8 cycles, until the confidence reaches 0.7), the default with a confidence source; ",
            "pooling from /generator; --confidence-model or --confidence changes it",
        ),
        (
            Settings(policy=Policy.MODEL), None, RTAP, "model (cycles until the model ends its turn), set by --policy;",
            "none",
        ),
    ],
)  # fmt: skip
def test_the_start_says_what_is_loaded_and_how_to_change_it(settings, confidence, fmt, policy, source):
    server = build(
        FakeEngine(["x"]), settings=settings, confidence=confidence, format=fmt, model="/m", format_source="why"
    )._server
    lines = start_lines(
        server_facts(replace(server, confidence=confidence), ["rtap", "/m"]), "http://h:1", has_keys=False
    )
    assert lines[0] == "model: /m, which requests call rtap or /m; --served-model-name changes it"
    assert lines[1] == f"format: {fmt.name} (why); --trajectory-format changes it"
    assert lines[2] == "ready at http://h:1 (page), http://h:1/v1 (API)"
    assert lines[3].startswith(f"policy: {policy}")
    assert lines[4].startswith(f"confidence: {source}")
    assert lines[5:] == [
        "keys: none; RTAP_API_KEYS or --api-keys-file sets them",
        "stop: Ctrl-C; running requests may finish for --drain-seconds",
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # vLLM does not close what cannot bind
def test_a_port_in_use_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("os.environ", dict(os.environ))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rtap serve: ")]
    expected = f"rtap serve: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port"
    assert lines == [expected]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--port", "80000"], "cannot listen on port 80000: choose a --port from 0 to 65535"),
        (
            ["--host", "192.0.2.1"],
            "Cannot assign requested address; choose another --host (127.0.0.1: this machine",
        ),
        (["--host", "no.such.host.invalid"], "; choose another --host (127.0.0.1: this machine only"),
        (
            ["--uds", "/no/such/folder/rtap.sock"],
            "socket /no/such/folder/rtap.sock: No such file or directory; choose another --uds",
        ),
        (["--uds", "/tmp/" + "x" * 200], "AF_UNIX path too long; choose another --uds"),
    ],
)
def test_an_address_that_cannot_be_had_says_what_to_change(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr("os.environ", dict(os.environ))
    assert main(flags) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("rtap serve: "))
    assert sentence in line


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_socket_file_of_a_server_that_is_gone_says_so_and_blames_no_port(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("os.environ", dict(os.environ))
    stale = tmp_path / "rtap.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(stale))
    assert main(["--uds", str(stale)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("rtap serve: "))
    assert line == (
        f"rtap serve: cannot listen on the unix socket {stale}: Address already in use; if no server uses the file, "
        "delete it, or choose another --uds"
    )


def test_the_start_says_how_to_calibrate_a_confidence_that_is_not():
    settings = Settings(confidence="yesno")
    server = build(FakeEngine(["x"]), settings=settings, generator=Artifact(), model="/m", format_source="why")._server
    facts = server_facts(server, ["/m"])
    assert facts["confidence"]["is_calibrated"] is False
    assert start_lines(facts, "http://h:1", has_keys=True)[4] == (
        "confidence: yesno, not calibrated, so votes count answers; `rtap calibrate /m --questions FILE -- "
        "--confidence yesno` fits it and writes the file for --confidence-config"
    )
