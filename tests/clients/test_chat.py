"""`rtap chat`: /set refuses what the server would refuse, and a server that is started fails with its message."""

import io

import pytest
from rich.console import Console

from rtap_client import chat as command
from rtap_client.chat import Chat
from rtap_client.client import RTAP
from rtap_client.commands import CommandParser, add_request_flags
from rtap_client.server_process import ServerFailed, started_server
from rtap_client.types import ServerConfig
from tests.clients.fake_server import Answer, fake_server

CONFIG = {
    "version": "1", "model": "/m", "models": ["rtap"], "format": "rtap", "format_source": "", "cycle_open": "",
    "policy_source": "",
    "defaults": {"policy": "model", "threshold": 0.5, "max_cycles": 8, "samples": 8, "select": "last",
                 "recursion": "fresh", "patience": None, "deadline_seconds": 600},
    "limits": {"max_cycles": 16, "samples": 32, "deadline_seconds": 600, "body_bytes": 1},
    "confidence": {"kind": "none", "model": None, "timeout_seconds": 1, "is_calibrated": False,
                   "calibration": {"weight": 1, "bias": 0}, "logistic": None},
}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--threshold 3", "'3' must be a number from 0 to 1"),
        ("--max-cycles 99", "--max-cycles 99 is above this server's limit of 16"),
        ("--samples 33", "--samples 33 is above this server's limit of 32"),
        ("--deadline 601", "--deadline 601 is above this server's limit of 600"),
        ("--policy confidence", "this server has none; use vote, model or single"),
        ("--model nope", "this server has no model nope; it has rtap"),
        ("--tresh 1", "unrecognized arguments: --tresh 1 (did you mean --threshold?)"),
    ],
)
def test_set_refuses_what_the_server_would_and_changes_nothing(flags: str, sentence: str) -> None:
    parser = CommandParser()
    add_request_flags(parser)
    args, output = parser.parse_args(["--seed", "1"]), io.StringIO()
    chat = Chat(RTAP("http://unused"), args, ServerConfig.construct(**CONFIG), Console(file=output, width=200))
    chat.command("set --seed 5 " + flags)
    assert sentence in output.getvalue()
    assert chat.args.seed == 1
    chat.command("set --max-cycles 16")
    assert chat.args.max_cycles == 16


def test_a_server_of_another_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server(Answer(body=CONFIG)) as fake:
        assert command.main(["other/model", "--url", fake.url]) == 2
    assert f"{fake.url} serves /m, not other/model; stop it, or leave out MODEL" in capsys.readouterr().err


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(ServerFailed, match="no model at /nowhere"), started_server("/nowhere", lambda _: None):
        pass
