"""Whether everyone can use the page: axe's rules, the keyboard alone, small screens, no network beyond the server."""

import pytest

from tests.server.page.browser import LIVE_STREAM, ScriptedAnswers, png, sse, upload

pytestmark = pytest.mark.browser

GROUNDED = (
    "A <p>red boat</p>[0.1, 0.45, 0.3, 0.6] and <p>gulls</p>[0.5, 0.45, 0.6, 0.5; 0.7, 0.45]; [0.2, 0.5].\n\n"
    "- **one**\n- `two`\n\nYear | Boats\n2019 | 128\n\n```\ncode\n```"
)

PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def axe():
    """axe(page) -> the ids and targets of violations that axe calls serious or critical."""
    reason = "needs the extra browser: pip install -e '.[browser]'"
    module = pytest.importorskip("axe_playwright_python.sync_playwright", reason=reason)

    def check(page):
        violations = module.Axe().run(page).response["violations"]
        return [
            (found["id"], [node["target"] for node in found["nodes"]])
            for found in violations
            if found["impact"] in ("serious", "critical")
        ]

    return check


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [{}, PHONE], ids=["laptop", "phone"])
def test_axe_finds_nothing_serious(visit, ask, axe, scheme, device):
    """In every state of the page: empty, answered, with each panel, an error, the dialog, the key."""
    page = visit(color_scheme=scheme, reduced_motion="reduce", **device)
    assert axe(page) == []
    ScriptedAnswers(page, sse(GROUNDED), 'data: {"error": {"message": "out of memory"}}\n\n')
    page.set_input_files("#pick-file", upload(png((600, 240))))
    page.wait_for_selector("#stage:visible")
    ask(page, "What is there?")
    ask(page, "And then?")
    page.fill("#question", "A draft")
    page.click("#tasks-button")
    page.locator(".legend-row").first.focus()
    assert axe(page) == []
    page.click("#parameters-button")
    assert not page.is_visible("#tasks-panel")
    page.fill("#temperature", "9")
    assert axe(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Edit").click()
    page.click("#mark-region")
    page.evaluate("document.getElementById('key-form').hidden = false")
    assert axe(page) == []
    page.click("#remove")
    assert axe(page) == []


def test_keyboard_alone(visit):
    """From a task to an answer, its list, and on to undoing it; the focus is always seen."""
    page = visit()
    ScriptedAnswers(page, sse("<p>It</p>[0.1, 0.45, 0.3, 0.6]"))
    page.set_input_files("#pick-file", upload(png((600, 240))))
    page.wait_for_selector("#stage:visible")
    page.evaluate("document.activeElement.blur()")
    seen = []

    def tab_to(name, most=40):
        for _ in range(most):
            page.keyboard.press("Tab")
            seen.append(focused(page))
            if seen[-1].startswith(name):
                return
        raise AssertionError(f"{name} is not reached: {seen}")

    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the question"
    tab_to("Mark region")
    tab_to("Remove")
    tab_to("Find an object")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn[data-status=complete]")
    tab_to("1 It", 60)
    assert page.locator("#overlay .lit").count() == 1
    for name in ("Copy", "Regenerate", "Edit", "Undo"):
        tab_to(name)
    page.keyboard.press("Enter")
    assert page.locator(".turn").count() == 0


def focused(page) -> str:
    """The name of the focused element. Fails if it has no outline, border or shadow that the others lack."""
    name, is_seen = page.evaluate(
        """() => {
             const element = document.activeElement;
             const style = getComputedStyle(element);
             const frame = getComputedStyle(element.closest("form") ?? element);
             const isSeen = style.outlineStyle !== "none" || frame.boxShadow !== "none" || element === document.body;
             return [element.innerText || element.labels?.[0]?.innerText || element.id, isSeen];
           }"""
    )
    assert is_seen, name
    return " ".join(name.split())


@pytest.mark.parametrize("width", [320, 360, 768, 1024, 1920])
def test_nothing_is_cut_off(visit, ask, width):
    """At any width the page does not scroll sideways, and every button is within it."""
    page = visit(viewport={"width": width, "height": 640})
    table = " | ".join(["a long heading"] * 12) + "\n" + " | ".join(["1"] * 12)
    ScriptedAnswers(page, sse(f"A <p>{'very-long-name' * 8}</p>[0.1, 0.45, 0.3, 0.6] {'x' * 200}\n\n{table}"))
    page.set_input_files("#pick-file", upload(png((600, 240)), "n" * 120 + ".png"))
    page.wait_for_selector("#stage:visible")
    ask(page, "What is " + "there" * 40)
    page.click("#parameters-button")
    page.fill("#temperature", "1.25")
    for selector in ("html", "#turns", "#plate"):
        wide, room = page.locator(selector).evaluate("part => [part.scrollWidth, part.clientWidth]")
        assert wide <= room, selector
    for shown in page.locator("button:visible").all():
        box = shown.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, shown.inner_text()
        # The least target size of WCAG 2.2.
        assert min(box["width"], box["height"]) >= 24, shown.inner_text()


@pytest.mark.parametrize("device", [{}, PHONE], ids=["laptop", "phone"])
def test_a_long_answer_is_followed_and_read_from_its_beginning(visit, device):
    """While it arrives its end is in sight, until the question is at the upper edge."""
    page = visit(lambda page: page.add_init_script(LIVE_STREAM), **device)
    page.set_input_files("#pick-file", upload(png((600, 240))))
    page.wait_for_selector("#stage:visible")
    for number in range(3):
        page.fill("#question", f"Question {number}?")
        page.press("#question", "Enter")
        for line in range(40):
            page.evaluate("text => live.send(text)", f"Line {line}\n\n")
        page.evaluate("live.finish()")
        page.wait_for_selector("#send:visible")
        edge = page.evaluate(
            """() => {
                 const plate = document.getElementById("plate");
                 const isPhone = getComputedStyle(plate).position === "sticky";
                 const turns = document.getElementById("turns");
                 return isPhone ? plate.getBoundingClientRect().bottom : turns.getBoundingClientRect().top;
               }"""
        )
        top = page.locator(".question").last.bounding_box()["y"]
        assert edge <= top <= edge + 60


def test_loads_from_this_server_alone(visit, address):
    """All files come from it, under a policy that allows nothing else; the fixture checks the requests."""
    seen = []
    page = visit(lambda page: page.on("response", lambda response: seen.append(response)))
    assert all(response.url.startswith(address) for response in seen)
    (document,) = [response for response in seen if response.request.resource_type == "document"]
    policy = document.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert {response.status for response in seen} == {200}
    assert page.evaluate("document.querySelectorAll('[style]:not([style*=\"--ratio\"]):not(#question)').length") == 0


@pytest.mark.parametrize("panel", ["tasks", "parameters"])
def test_question_stays_in_sight_on_a_phone(visit, ask, panel):
    """With an image, a panel and a notice, Send is still within the window."""
    page = visit(**PHONE)
    ScriptedAnswers(page, sse("Yes."))
    page.set_input_files("#pick-file", upload(png((600, 400))))
    page.wait_for_selector("#stage:visible")
    ask(page, "Is it?")
    page.set_input_files("#pick-file", upload(b"x", "no-image.txt", "text/plain"))
    page.wait_for_selector("#notice:visible")
    page.click(f"#{panel}-button")
    box = page.locator("#send").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 640
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == f"{panel}-button"
