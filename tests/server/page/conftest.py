"""A server with the shipped nano, and Chromium looking at its page."""

import json
from urllib.parse import urlsplit

import pytest

from tests.instruments.serving import NANO, serving
from tests.server.page import browser


@pytest.fixture(scope="session")
def playwright():
    """Playwright's module, where there is a browser for it."""
    reason = "needs the extra browser: pip install -e '.[browser]'"
    module = pytest.importorskip("playwright.sync_api", reason=reason)
    if browser.CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    return module


@pytest.fixture(scope="session")
def address(playwright, tmp_path_factory):
    """Of a running server; of none if there is no browser to look at it."""
    with serving(tmp_path_factory.mktemp("page"), *NANO) as server:
        yield server.url


@pytest.fixture(scope="module")
def chromium(playwright):
    """Chromium without a window.

    Ends before tests elsewhere begin: until then an event loop runs in this thread, and `asyncio.run` is refused.
    """
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=browser.CHROMIUM, args=browser.CHROMIUM_ARGS)
        yield launched
        launched.close()


@pytest.fixture
def visit(address, chromium):
    """visit(prepare=..., **context options) -> the loaded page in a fresh profile, once it can be asked.

    `prepare(page)` runs before the page is loaded. Each test fails if its pages logged an error, or asked another
    host; that a request was answered with an error is logged by Chromium itself, and allowed.
    """
    contexts, problems = [], []
    host = urlsplit(address).netloc

    def watch(page):
        page.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
        page.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
        page.on("request", lambda request: _is_elsewhere(request.url, host) and problems.append(request.url))

    def open_page(prepare=None, ready=True, **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        watch(page)
        if prepare:
            prepare(page)
        page.goto(address)
        if ready:
            page.wait_for_selector("#state[data-state=ready]", state="attached")
            browser.until(lambda: page.title() != "sphinx-jax")
        return page

    yield open_page
    for context in contexts:
        context.close()
    unexpected = [problem for problem in problems if not problem.startswith("Failed to load resource")]
    assert not unexpected, unexpected


def _is_elsewhere(url: str, host: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme not in ("data", "blob") and parts.netloc != host


@pytest.fixture
def ask():
    """ask(page, question): send it, and wait until the answer is complete. Returns the last turn's locator."""

    def send(page, question: str):
        page.fill("#question", question)
        page.press("#question", "Enter")
        page.wait_for_selector("#send:visible")
        return page.locator(".turn").last

    return send


@pytest.fixture
def card():
    """card(page, **changes): let /v1/models answer with changed fields."""

    def change(page, **changes):
        def answer(route):
            body = route.fetch().json()
            body["data"][0] |= changes
            route.fulfill(status=200, content_type="application/json", body=json.dumps(body))

        page.route("**/v1/models", answer)

    return change
