"""Command-line mistakes of `rtap serve` that are found before anything is loaded: exit code 2 and one sentence."""

import os
import socket

import pytest

from server.__main__ import main


@pytest.mark.parametrize(
    ("flags", "environ", "sentence"),
    [
        (["--threshold", "2"], {}, "--threshold (or RTAP_THRESHOLD)='2'"),
        (["--policy", "confidence"], {}, "policy=confidence needs a generator"),
        (["--policy", "sure"], {}, "--policy (or RTAP_POLICY)='sure'"),
        ([], {"RTAP_TRESHOLD": "1"}, "unknown settings in the environment: RTAP_TRESHOLD"),
        (["--confidence", "remote", "--confidence-model", "/m"], {}, "confidence=remote needs a http(s) address"),
        (["--api-server-count", "2"], {}, "rtap runs one API process"),
        (["--headless"], {}, "rtap runs one API process"),
        (["--api-key", "secret"], {}, "leave out --api-key, which every user of the machine can read"),
        (["--api-keys-file", "/nowhere/keys"], {}, "cannot read the API keys file /nowhere/keys: No such file"),
        ([], {"RTAP_API_KEYS": ","}, "RTAP_API_KEYS must be keys of printable ASCII"),
        (["--reasoning-parser", "qwen3"], {}, "leave out --reasoning-parser qwen3"),
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # vLLM does not close what cannot bind
def test_a_port_in_use_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("os.environ", dict(os.environ))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rtap serve: ")]
    expected = f"rtap serve: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port"
    assert lines == [expected]
