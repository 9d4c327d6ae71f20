"""`rtap ask`: stdout, stderr, exit codes, and error messages that name the next step."""

import io
import json
import socket

import pytest

from rtap_client import ask
from tests.clients.fake_server import CONTENT, CYCLE_END, DRAFTS, LAST, REPLY, Answer, Fake, error, fake_server, stream

MODELS = Answer(body={"object": "list", "data": [{"id": "rtap", "object": "model", "created": 1, "owned_by": "x"}]})


@pytest.fixture
def run_ask(capsys):
    """Run `rtap ask`; (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        code = ask.main(list(argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def sent(fake: Fake):
    return fake.requests[-1][2]


def test_only_the_answer_is_on_stdout(run_ask):
    with fake_server(MODELS, Answer(body=REPLY)) as fake:
        assert run_ask("2+2", "--url", fake.url) == (0, "4\n", "")
        assert sent(fake) == {"model": "rtap", "messages": [{"role": "user", "content": "2+2"}], "rtap": {}}


def test_every_flag_reaches_the_request(run_ask):
    flags = (
        "--model m --policy vote --threshold 0.7 --max-cycles 3 --samples 4 --select last --recursion fresh "
        "--patience 2 --deadline 5 --max-tokens 70 --temperature 0.5 --seed 8 --system brief"
    )
    with fake_server(Answer(body=REPLY)) as fake:
        assert run_ask("2+2", "--url", fake.url, *flags.split())[0] == 0
        assert sent(fake) == {
            "model": "m", "max_tokens": 70, "temperature": 0.5, "seed": 8,
            "messages": [{"role": "system", "content": "brief"}, {"role": "user", "content": "2+2"}],
            "rtap": {
                "policy": "vote", "threshold": 0.7, "max_cycles": 3, "samples": 4, "select": "last",
                "recursion": "fresh", "patience": 2, "deadline_seconds": 5.0,
            },
        }  # fmt: skip


def test_json_is_one_object_and_cycles_are_on_stderr(run_ask):
    with fake_server(MODELS, Answer(body=REPLY)) as fake:
        code, out, err = run_ask("2+2", "--url", fake.url, "--json", "--cycles")
    shown = json.loads(out)
    assert code == 0
    assert (shown["answer"], shown["id"], shown["rtap"]) == ("4", "chatcmpl-1", REPLY["rtap"])
    assert shown["usage"]["completion_tokens"] == 7
    assert err == "1 ✓ 0.900 4\n"


def test_on_a_terminal_the_answer_that_is_being_written_is_on_stderr_until_it_is_complete(run_ask, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with fake_server(MODELS, stream(*DRAFTS, CYCLE_END, CONTENT, LAST)) as fake:
        code, out, err = run_ask("2+2", "--url", fake.url, "--json", "--cycles")
        assert sent(fake)["rtap"] == {"drafts": True}
        assert sent(fake)["stream"]
    shown = json.loads(out)
    assert (code, shown["answer"], shown["model"], shown["finish_reason"]) == (0, "4", "rtap", "stop")
    assert (shown["id"], shown["rtap"]) == ("chatcmpl-1", REPLY["rtap"])
    assert err.endswith("1 ✓ 0.900 4\n")


def test_an_answer_below_the_threshold_is_not_sure_on_stderr(run_ask):
    below = {**REPLY["rtap"], "stop_reason": "max_cycles", "confidence": 0.13}
    with fake_server(MODELS, Answer(body={**REPLY, "rtap": below})) as fake:
        assert run_ask("2+2", "--url", fake.url) == (0, "4\n", "rtap ask: not sure (0.13, below the threshold)\n")


def test_a_dash_reads_the_question_from_stdin(run_ask, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("what is\n2+2?\n"))
    with fake_server(MODELS, Answer(body=REPLY)) as fake:
        assert run_ask("-", "--url", fake.url)[0] == 0
        assert sent(fake)["messages"][0]["content"] == "what is\n2+2?\n"


def test_an_unquoted_question_is_joined(run_ask):
    with fake_server(MODELS, Answer(body=REPLY)) as fake:
        assert run_ask("make", "82", "from", "3,", "7,", "25", "--url", fake.url)[0] == 0
        assert sent(fake)["messages"][0]["content"] == "make 82 from 3, 7, 25"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RTAP_URL": "localhost:8000"}, "does not begin with http:// or https://; try --url http://localhost:8000"),
        ({"RTAP_URL": "htp://host/v1"}, "does not begin with http:// or https://; try --url http://host/v1"),
        ({"RTAP_API_KEY": "sk-1\n"}, "RTAP_API_KEY contains a line break or a character that is not ASCII"),
        ({"RTAP_API_KEY": "sk–1"}, "RTAP_API_KEY contains a line break or a character that is not ASCII"),
    ],
)
def test_a_bad_address_or_key_is_a_usage_error(run_ask, monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out, err = run_ask("2+2")
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_an_empty_question_is_a_usage_error(run_ask):
    assert run_ask(" ") == (2, "", "rtap ask: the question is empty; give one, or - to read it from stdin\n")


def test_no_server_says_how_to_start_one(run_ask):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code, out, err = run_ask("2+2", "--url", url, "--model", "rtap")
    assert (code, out) == (3, "")
    assert (
        err
        == f"rtap ask: no server answers at {url}; start one with `rtap serve`, or name yours with --url or RTAP_URL\n"
    )


def test_a_slow_server_says_what_to_raise(run_ask):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code, _, err = run_ask("2+2", "--url", url, "--model", "rtap", "--timeout", "0.1")
    assert code == 1
    assert (
        err
        == f"rtap ask: {url} did not answer in time; raise --timeout, or set --deadline to get the best answer so far\n"
    )


@pytest.mark.parametrize(
    ("answer", "ending"),
    [
        (error(401, "no such key"), "refused the API key (no such key); set RTAP_API_KEY to a key of this server"),
        (error(400, "rtap.n=2: too high"), "rtap.n=2: too high; change the request (`--help` lists the flags)"),
        (error(429, "60 requests a minute.", Retry_After="61"), "60 requests a minute; try again in 61 s"),
        (error(503, "the server is full", Retry_After="70"), "the server is full; try again in 70 s"),
        (error(500, "oh no", x_request_id="r-1"), "failed (500: oh no); see its log for r-1"),
        (error(404, "not found"), "name yours with --url or RTAP_URL"),
    ],
)  # fmt: skip
def test_a_refusal_ends_in_the_next_step(run_ask, answer, ending):
    with fake_server(answer) as fake:
        code, out, err = run_ask("2+2", "--url", fake.url, "--model", "rtap")
    assert (code, out) == (1, "")
    assert err.startswith("rtap ask: ")
    assert err.endswith(f"{ending}\n")
    assert err.count("\n") == 1


def test_it_retries_only_with_the_flag(run_ask):
    answers = (error(503, "full", Retry_After="0.1"), Answer(body=REPLY))
    with fake_server(*answers) as fake:
        assert run_ask("2+2", "--url", fake.url, "--model", "rtap")[0] == 1
    with fake_server(*answers) as fake:
        assert run_ask("2+2", "--url", fake.url, "--model", "rtap", "--retries", "1") == (0, "4\n", "")


def test_a_wrong_model_name_lists_the_right_ones(run_ask):
    with fake_server(error(404, "The model `gpt` does not exist."), MODELS) as fake:
        _, _, err = run_ask("2+2", "--url", fake.url, "--model", "gpt")
    assert err == "rtap ask: The model `gpt` does not exist; name one of its models with --model: rtap\n"


def test_a_cut_answer_is_a_failure(run_ask):
    cut = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": None}}
    with fake_server(MODELS, Answer(body=REPLY | {"choices": [cut]})) as fake:
        code, out, err = run_ask("2+2", "--url", fake.url)
    assert (code, out) == (1, "")
    assert "(finish_reason length); raise --max-tokens or --deadline" in err
