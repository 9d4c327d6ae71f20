"""The code snippets of the page run and send the page's own request."""

import subprocess
import sys

import pytest
from playwright.sync_api import expect

from rtap_core.types import Policy, StopReason
from tests.page.scripted_server import MENDED, told

pytestmark = pytest.mark.slow
QUESTION = """it's "82" from 3, 7, 25?\n$HOME `id` \\ ${x} 'quoted' é 🎲 </script>"""
# Stands in for the openai package: the SDK's call, as a request. The SDK itself was tried by hand (docs/page.md).
OPENAI_JS = """
export default class { constructor({ baseURL, apiKey }) { this.chat = { completions: { create: async (body) =>
  (await fetch(`${baseURL}/chat/completions`, { method: "POST", body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${apiKey}` } })).json() } }; } }
"""


def whole(_):
    """A reply that is not streamed."""
    from fastapi.responses import JSONResponse

    message = {"role": "assistant", "content": "25*3+7"}
    return JSONResponse({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "rtap",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "rtap": told(MENDED, Policy.CONFIDENCE, StopReason.THRESHOLD),
    })  # fmt: skip


@pytest.mark.parametrize("language", ["curl", "Python", "TypeScript"])
def test_what_is_copied_runs(visit, server, tmp_path, language):
    server.answers = whole
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    expect(page.locator("#state")).to_have_text("Ready · rtap")
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("slider", name="Threshold").press("End")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Seed").fill("9")
    page.get_by_text("This request as code").click()
    page.get_by_text(language, exact=True).click()
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("#copy")).to_have_text("Copied")
    code = page.evaluate("navigator.clipboard.readText()")
    assert code == page.locator("#snippet").text_content()
    if language == "TypeScript":
        package = tmp_path / "node_modules" / "openai"
        package.mkdir(parents=True)
        (package / "package.json").write_text('{"type": "module", "main": "index.js"}')
        (package / "index.js").write_text(OPENAI_JS)
        (tmp_path / "ask.mjs").write_text(code)
    command = {
        "curl": ["sh", "-c", code],
        "Python": [sys.executable, "-c", code],
        "TypeScript": ["node", "ask.mjs"],
    }[language]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "25*3+7" in done.stdout
    (body,) = server.asked
    assert body == {
        "model": "rtap", "seed": 9, "messages": [{"role": "user", "content": QUESTION}],
        "rtap": {"threshold": 1, "return_cycles": True},
    }  # fmt: skip


def test_without_a_clipboard_the_code_is_selected(visit, server):
    page = visit()
    expect(page.locator("#state")).to_have_text("Ready · rtap")
    page.get_by_text("This request as code").click()
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("#copy")).to_have_text("Selected: copy it with your keyboard")
    assert page.evaluate("getSelection().toString().trim()") == page.locator("#snippet").inner_text().strip()
