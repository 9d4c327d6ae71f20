"""The page's static files: security headers, no external resources, small."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from rtap_server.routes.page import FILES, page_router

FOLDER = Path(__file__).resolve().parents[2] / "server" / "rtap_server" / "routes" / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(page_router())
    return TestClient(app)


def test_every_file_of_the_folder_is_served_and_no_other() -> None:
    assert sorted(FILES.values()) == sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_each_file_with_its_type_and_headers(client: TestClient, path: str, method: str) -> None:
    reply = client.request(method, path)
    assert reply.status_code == 200
    assert reply.headers["content-type"].split(";")[0] == TYPES[Path(FILES[path]).suffix]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["x-frame-options"] == "DENY"
    assert reply.headers["cache-control"] == "no-cache"
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert reply.content == (b"" if method == "HEAD" else (FOLDER / FILES[path]).read_bytes())


def test_a_file_that_the_browser_has_is_not_sent_again(client: TestClient) -> None:
    etag = client.get("/page/main.js").headers["etag"]
    again = client.get("/page/main.js", headers={"if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")
    assert "content-security-policy" in again.headers


@pytest.mark.parametrize(
    "path", ["/page", "/page/", "/page/../page.py", "/page/..%2fpage.py", "/page/%2e%2e/page.py", "/page/index.html"]
)
def test_no_path_reaches_another_file(client: TestClient, path: str) -> None:
    assert client.get(path, follow_redirects=False).status_code == 404


def test_writing_to_the_page_is_refused(client: TestClient) -> None:
    assert client.post("/").status_code == 405


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    html = (FOLDER / "index.html").read_text()
    assert not re.search(r"\son\w+\s*=|\sstyle\s*=|<style|javascript:|<script(?![^>]*\ssrc=)", html)
    for path in FOLDER.iterdir():
        outside = set(re.findall(r"https?://[^\s\"'<>`)]+", path.read_text())) - {"http://www.w3.org/2000/svg"}
        assert not outside, path
        markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|@import|\burl\("
        assert not re.search(markup, path.read_text()), path


def test_what_is_linked_is_served() -> None:
    html = (FOLDER / "index.html").read_text()
    linked = {"/" + name for name in re.findall(r"(?:src|href)=\"(?!#)([^\"]+)\"", html)}
    for script in FOLDER.glob("*.js"):
        linked |= {f"/page/{name}" for name in re.findall(r"from \"\./([^\"]+)\"", script.read_text())}
    assert linked | {"/"} == set(FILES)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 100_000
    assert all(len(path.read_text().splitlines()) <= 300 for path in FOLDER.iterdir())
