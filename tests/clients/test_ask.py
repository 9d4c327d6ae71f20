"""`rtap ask`: what goes to stdout and stderr, exit codes, and a next step for every mistake."""

import io
import json
import socket

import pytest

from rtap_client import ask
from tests.clients.fake_server import REPLY, Answer, Fake, error, fake_server

MODELS = Answer(body={"object": "list", "data": [{"id": "rtap", "object": "model", "created": 1, "owned_by": "x"}]})


@pytest.fixture
def told(capsys):
    """Run `rtap ask`; (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        code = ask.main(list(argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def sent(fake: Fake):
    return fake.requests[-1][2]


def test_only_the_answer_is_on_stdout(told):
    with fake_server(MODELS, Answer(body=REPLY)) as fake:
        assert told("2+2", "--url", fake.url) == (0, "4\n", "")
        assert sent(fake) == {"model": "rtap", "messages": [{"role": "user", "content": "2+2"}], "rtap": {}}


def test_every_flag_reaches_the_request(told):
    flags = (
        "--model m --policy vote --threshold 0.7 --max-cycles 3 --samples 4 --select last --patience 2 --deadline 5 "
        "--probe-every 6 --max-tokens 70 --temperature 0.5 --seed 8 --system brief"
    )
    with fake_server(Answer(body=REPLY)) as fake:
        assert told("2+2", "--url", fake.url, *flags.split())[0] == 0
        assert sent(fake) == {
            "model": "m", "max_tokens": 70, "temperature": 0.5, "seed": 8,
            "messages": [{"role": "system", "content": "brief"}, {"role": "user", "content": "2+2"}],
            "rtap": {
                "policy": "vote", "threshold": 0.7, "max_cycles": 3, "samples": 4, "select": "last", "patience": 2,
                "deadline_seconds": 5.0, "probe_every": 6,
            },
        }  # fmt: skip


def test_json_is_one_object_and_cycles_are_on_stderr(told):
    with fake_server(MODELS, Answer(body=REPLY)) as fake:
        code, out, err = told("2+2", "--url", fake.url, "--json", "--cycles")
    shown = json.loads(out)
    assert code == 0
    assert (shown["answer"], shown["id"], shown["rtap"]) == ("4", "chatcmpl-1", REPLY["rtap"])
    assert shown["usage"]["completion_tokens"] == 7
    assert err == "1 ✓ 0.900 4\n"


def test_a_dash_reads_the_question_from_stdin(told, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("what is\n2+2?\n"))
    with fake_server(MODELS, Answer(body=REPLY)) as fake:
        assert told("-", "--url", fake.url)[0] == 0
        assert sent(fake)["messages"][0]["content"] == "what is\n2+2?\n"


def test_a_question_needs_no_quotes(told):
    with fake_server(MODELS, Answer(body=REPLY)) as fake:
        assert told("make", "82", "from", "3,", "7,", "25", "--url", fake.url)[0] == 0
        assert sent(fake)["messages"][0]["content"] == "make 82 from 3, 7, 25"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RTAP_URL": "localhost:8000"}, "does not begin with http:// or https://; try --url http://localhost:8000"),
        ({"RTAP_URL": "htp://host/v1"}, "does not begin with http:// or https://; try --url http://host/v1"),
        ({"RTAP_API_KEY": "sk-1\n"}, "the key in RTAP_API_KEY has a line break or a letter that no key has"),
        ({"RTAP_API_KEY": "sk–1"}, "the key in RTAP_API_KEY has a line break or a letter that no key has"),
    ],
)
def test_what_no_request_could_be_made_with_is_a_usage_error(told, monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out, err = told("2+2")
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_an_empty_question_is_a_usage_error(told):
    assert told(" ") == (2, "", "rtap ask: the question is empty; give one, or - to read it from stdin\n")


def test_no_server_says_how_to_start_one(told):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code, out, err = told("2+2", "--url", url, "--model", "rtap")
    assert (code, out) == (3, "")
    assert (
        err
        == f"rtap ask: no server answers at {url}; start one with `rtap serve`, or name yours with --url or RTAP_URL\n"
    )


def test_a_slow_server_says_what_to_raise(told):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code, _, err = told("2+2", "--url", url, "--model", "rtap", "--timeout", "0.1")
    assert code == 1
    assert err == f"rtap ask: no answer from {url} in time; raise --timeout, or set --deadline for the best so far\n"


@pytest.mark.parametrize(
    ("answer", "ending"),
    [
        (error(401, "no such key"), "takes another API key (no such key); put yours into the variable RTAP_API_KEY"),
        (error(400, "rtap.n=2: too high"), "rtap.n=2: too high; change the request (`--help` lists the flags)"),
        (error(429, "60 requests a minute.", Retry_After="61"), "60 requests a minute; ask again in 61 s"),
        (error(503, "the server is full", Retry_After="70"), "the server is full; ask again in 70 s"),
        (error(500, "oh no", x_request_id="r-1"), "failed (500: oh no); look into its log for request r-1"),
        (error(404, "not found"), "name yours with --url or RTAP_URL"),
    ],
)  # fmt: skip
def test_what_the_server_refuses_ends_in_what_to_do(told, answer, ending):
    with fake_server(answer) as fake:
        code, out, err = told("2+2", "--url", fake.url, "--model", "rtap")
    assert (code, out) == (1, "")
    assert err.startswith("rtap ask: ")
    assert err.endswith(f"{ending}\n")
    assert err.count("\n") == 1


def test_it_tries_again_only_when_asked_to(told):
    answers = (error(503, "full", Retry_After="0.1"), Answer(body=REPLY))
    with fake_server(*answers) as fake:
        assert told("2+2", "--url", fake.url, "--model", "rtap")[0] == 1
    with fake_server(*answers) as fake:
        assert told("2+2", "--url", fake.url, "--model", "rtap", "--retries", "1") == (0, "4\n", "")


def test_a_wrong_model_name_lists_the_right_ones(told):
    with fake_server(error(404, "The model `gpt` does not exist."), MODELS) as fake:
        _, _, err = told("2+2", "--url", fake.url, "--model", "gpt")
    assert err == "rtap ask: The model `gpt` does not exist; name one of its models with --model: rtap\n"


def test_an_answer_that_was_cut_is_a_failure(told):
    cut = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": None}}
    with fake_server(MODELS, Answer(body=REPLY | {"choices": [cut]})) as fake:
        code, out, err = told("2+2", "--url", fake.url)
    assert (code, out) == (1, "")
    assert "(finish_reason length); raise --max-tokens or --deadline" in err
