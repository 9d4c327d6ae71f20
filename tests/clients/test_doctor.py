"""`rtap doctor`: checks of the client, of a server, and of packages that register their own."""

import json
import socket
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from rtap_client import doctor
from rtap_client.cli import install
from rtap_client.doctor import Check
from tests.clients.fake_server import Answer, error, fake_server

CONFIG = Answer(
    body={
        "version": "0.1.0", "models": ["rtap"], "defaults": {"policy": "confidence"}, "confidence": {"kind": "pooling"}
    }
)  # fmt: skip


def only(checks) -> Check:
    (check,) = checks
    return check


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (metadata / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Folder that comes first on sys.path."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def test_this_installation_is_in_order():
    assert doctor.python_version().status == "ok"
    assert only(doctor.packages()).status == "ok"


def test_a_package_out_of_range_is_named_with_its_range(installed):
    distribution(installed, "rtap", "0.1.0", "openai<3,>=2.25", "nothing-like-it>=1", 'trl<1.0; extra == "train"')
    distribution(installed, "openai", "1.4")
    distribution(installed, "trl", "1.16")
    found = only(doctor.packages())
    assert found.status == "failed"
    assert "openai 1.4 is not <3,>=2.25" in found.found
    assert "nothing-like-it is missing (required: >=1)" in found.found
    assert "trl 1.16 is not <1.0" in found.found
    assert found.todo.startswith(f"Run `{install('serve,cpu,train')}`")


def test_a_wrong_python_names_the_right_one(installed):
    distribution(installed, "rtap", "0.1.0")
    metadata = installed / "rtap-0.1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text() + "Requires-Python: <3.9\n")
    found = doctor.python_version()
    assert (found.status, "rtap needs <3.9" in found.found) == ("failed", True)
    assert "make setup PYTHON=" in found.todo


def test_a_healthy_server():
    with fake_server(Answer(body={"status": "ready"}), CONFIG) as fake:
        found = only(doctor.server(f"{fake.url}/v1", "key"))
        assert fake.sent("authorization") == ["Bearer key"] * 2
    expected = f"rtap 0.1.0 at {fake.url}: rtap; policy confidence, confidence by pooling"
    assert found == Check("server", "ok", expected)


@pytest.mark.parametrize(
    ("answers", "words", "todo"),
    [
        ([Answer(503, {})], "is not ready", "Wait until it has loaded"),
        ([Answer(body={}), error(401, "no")], "refused the API key", "Set RTAP_API_KEY"),
        ([Answer(body={}), error(404, "no")], "is not an rtap server (status 404)", "with --url or RTAP_URL"),
        ([Answer(body={}), Answer(body="<html>")], "is not an rtap server", "with --url or RTAP_URL"),
        ([Answer(body={}), Answer(body={"version": "1"})], "is not an rtap server", "with --url or RTAP_URL"),
    ],
)
def test_a_server_that_fails(answers, words, todo):
    with fake_server(*answers) as fake:
        found = only(doctor.server(fake.url, None))
    assert found.status == "failed"
    assert words in found.found
    assert todo in found.todo


@pytest.mark.parametrize(("named", "status"), [(True, "failed"), (False, "skipped")])
def test_no_server_fails_only_if_an_address_was_given(named, status):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        found = only(doctor.server(url, None)) if named else None
    if found is None:  # the default address may have a server on this machine
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(doctor, "TIMEOUT_SECONDS", 1e-9)
            found = only(doctor.server(None, None))
    assert (found.status, found.todo) == (status, "Start one with `rtap serve`, or name yours with --url or RTAP_URL.")


def part(folder: Path, body: str) -> EntryPoint:
    (folder / "checks_of_a_part.py").write_text(body)
    sys.modules.pop("checks_of_a_part", None)
    return EntryPoint("part", "checks_of_a_part:checks", doctor.GROUP)


def findings(point: EntryPoint) -> list[Check]:
    return [c for c in doctor.run({"url": None, "port": 7}, [point]) if c.name in ("part", "port")]


def test_packages_add_checks_and_an_exception_is_a_failed_check(installed):
    working = "def checks(arguments):\n    yield {'name': 'port', 'status': 'ok', 'found': str(arguments['port'])}\n"
    assert findings(part(installed, working)) == [Check("port", "ok", "7")]
    broken = findings(part(installed, f"{working}    raise ValueError('oh no')\n"))
    assert broken[0] == Check("port", "ok", "7")
    assert (broken[1].status, "oh no" in broken[1].found) == ("failed", True)
    absent = findings(part(installed, "import no_such_module_anywhere\n"))
    assert (absent[0].status, install("cpu") in absent[0].todo) == ("skipped", True)


def test_lines_or_json_and_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "GROUP", "rtap.no-such-group")
    with fake_server(Answer(503, {})) as fake:
        assert doctor.main(["--url", fake.url]) == 1
        shown = capsys.readouterr().out
        assert f"✗ server: {fake.url} is not ready\n    → Wait until" in shown
        assert shown.endswith("\n1 to fix: server.\n")
    with fake_server(Answer(body={}), CONFIG) as fake:
        assert doctor.main(["--url", fake.url, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert [c["name"] for c in report["checks"]] == ["python", "packages", "server"]
