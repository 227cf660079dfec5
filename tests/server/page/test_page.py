"""The page in Chromium: images, questions, answers and errors, as a user meets them."""

import base64
import json
import re

import pytest
from PIL import Image

from tests.server.page.browser import LIVE_STREAM, ScriptedAnswers, noise, png, sse, until, upload

pytestmark = pytest.mark.browser

# The prompts that SPHINX was trained with, as its authors' demo lists them.
PROMPTS = [
    "What's in the image?",
    "Generate a detailed description about the image.",
    "Provide a one-sentence caption for the provided image.",
    "Please provide the bounding box coordinate of the region this sentence describes: blue backpack.",
    "Please provide the bounding box coordinate of the region this sentence describes: people on car.",
    "Describe the image concisely. Include the bounding box for each mentioned object.",
    "Detect all people shown in the image.",
    "Detect the key points of the person in the region [x1, y1, x2, y2].",
    "Please detect all texts and provide their bounding box coordinate.",
    "Convert this chart to a table.",
]


@pytest.fixture
def live(visit):
    """A page whose answers the test sends piece by piece."""
    return visit(lambda page: page.add_init_script(LIVE_STREAM))


def drop(page, data: bytes, name="dropped.png", kind="image/png"):
    """Drop a file on the page, or with empty `data` none."""
    transfer = page.evaluate_handle(
        """([text, name, type]) => {
             const transfer = new DataTransfer();
             const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
             if (bytes.length) transfer.items.add(new File([bytes], name, {type}));
             return transfer;
           }""",
        [base64.b64encode(data).decode(), name, kind],
    )
    page.dispatch_event("#mat", "drop", {"dataTransfer": transfer})


def paste(page, data: bytes, name="pasted.png", text=None):
    page.evaluate(
        """([data, name, text]) => {
             const clipboardData = new DataTransfer();
             const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
             clipboardData.items.add(new File([bytes], name, {type: "image/png"}));
             if (text !== null) clipboardData.setData("text/plain", text);
             const event = new ClipboardEvent("paste", {clipboardData, bubbles: true, cancelable: true});
             document.getElementById("question").dispatchEvent(event);
           }""",
        [base64.b64encode(data).decode(), name, text],
    )


# With the model


def test_model_answers_about_a_dropped_image(visit, ask, tmp_path):
    """The shipped nano names what is drawn, as the Python interface does, and says how long it took."""
    page = visit()
    image = Image.new("RGB", (64, 64), "white")
    image.paste("blue", (20, 20, 44, 44))
    image.save(tmp_path / "square.png")
    drop(page, (tmp_path / "square.png").read_bytes())
    turn = ask(page, "what shape is in the image?")
    assert turn.locator(".answer").inner_text() == "rectangle"
    assert ask(page, "what is the colour of the shape?").locator(".answer").inner_text() == "blue"
    statistics = turn.locator(".statistics").inner_text()
    assert "tokens" in statistics and "first token after" in statistics and "(stop)" in statistics


def test_parameters_reach_the_model(visit, ask):
    """One token at most: the server ends the answer for its length."""
    page = visit()
    page.click("#parameters-button")
    page.fill("#max-tokens", "1")
    assert "(length)" in ask(page, "what shape is in the image?").locator(".statistics").inner_text()


def test_server_refuses_in_place(visit, ask):
    """The server's own sentence is where the answer would be, and another question can be asked."""
    page = visit(lambda page: page.route("**/v1/chat/completions", with_model("another")))
    turn = ask(page, "Anything?")
    assert "another" in turn.locator(".error").inner_text()
    page.unroute("**/v1/chat/completions")
    turn.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".turn[data-status=complete]")
    assert page.locator(".turn").count() == 1


def with_model(name):
    def ask_another(route):
        route.continue_(post_data=json.dumps(json.loads(route.request.post_data) | {"model": name}))

    return ask_another


# Images


@pytest.mark.parametrize("way", ["pick", "drop", "paste", "camera"])
def test_image_is_sent_as_it_is(visit, ask, way):
    """The file's own bytes, though it is larger than the model looks at, in the first message only."""
    data = noise((900, 200))
    page = visit()
    answers = ScriptedAnswers(page, sse("Yes."))
    match way:
        case "pick":
            page.set_input_files("#pick-file", upload(data))
        case "camera":
            assert page.get_attribute("#camera-file", "capture") == "environment"
            page.set_input_files("#camera-file", upload(data))
        case "drop":
            drop(page, data)
        case "paste":
            paste(page, data)
    page.wait_for_selector("#stage:visible")
    assert page.inner_text("#image-size").startswith("900 × 200") and not page.is_visible("#notice")
    ask(page, "Is it?")
    ask(page, "Really?")
    assert answers.image() == data
    first, *others = answers.requests[-1]["messages"]
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert others == [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Really?"}]


def test_text_is_dropped_into_the_question(visit):
    """A drop of text on its field is the browser's; anywhere else it is no image."""
    page = visit()
    drop = """(selector) => {
      const dataTransfer = new DataTransfer();
      dataTransfer.setData("text/plain", "words");
      const event = new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true});
      return document.querySelector(selector).dispatchEvent(event);
    }"""
    assert page.evaluate(drop, "#question") is True and not page.is_visible("#notice")
    assert page.evaluate(drop, "#mat") is False and page.is_visible("#notice")


def test_pasted_text_with_an_image_stays_text(visit):
    page = visit()
    paste(page, png((8, 8)), text="a cell of a table")
    page.wait_for_timeout(100)
    assert not page.is_visible("#stage")


@pytest.mark.parametrize(
    ("data", "name", "kind", "says"),
    [
        (b"", "", "", "not fetched"),
        (b"%PDF-1.7", "paper.pdf", "application/pdf", "paper.pdf is no image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg", "image/svg+xml", "a.svg is no image"),
        (b"\x89PNG\r\n\x1a\n and no more", "half.png", "image/png", "half.png is damaged"),
    ],
    ids=["no file", "pdf", "svg", "damaged"],
)
def test_what_is_no_image_is_said(visit, data, name, kind, says):
    page = visit()
    drop(page, data, name, kind)
    page.wait_for_selector("#notice:visible")
    assert says in page.inner_text("#notice-text")
    assert not page.is_visible("#stage")


def test_another_image_starts_a_new_conversation(visit, ask):
    """After the user agreed; otherwise everything stays."""
    page = visit()
    ScriptedAnswers(page, sse("Yes."))
    page.set_input_files("#pick-file", upload(png((60, 40)), "first.png"))
    ask(page, "Is it?")
    page.set_input_files("#pick-file", upload(png((60, 40)), "second.png"))
    page.wait_for_selector("#new-image")
    assert "second.png" in page.inner_text("#new-image-text")
    page.keyboard.press("Escape")
    assert page.inner_text("#image-name") == "first.png" and page.locator(".turn").count() == 1
    page.set_input_files("#pick-file", upload(png((60, 40)), "second.png"))
    page.click("#new-image-start")
    until(lambda: page.locator(".turn").count() == 0)
    assert page.inner_text("#image-name") == "second.png"
    page.click("#remove")
    assert page.is_visible("#invite") and not page.is_visible("#new-image")


# Asking


def test_enter_sends_and_shift_enter_breaks(visit):
    page = visit()
    answers = ScriptedAnswers(page, sse("Yes."))
    page.focus("#question")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert not answers.requests
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn[data-status=complete]")
    assert answers.requests[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert answers.requests[0]["stream"] is True and answers.requests[0]["stream_options"] == {"include_usage": True}
    assert page.input_value("#question") == ""


def test_answer_streams_and_is_announced_once(live):
    """The text grows as it comes; the live region of screen readers gets the whole of it, one time."""
    live.evaluate(
        """() => {
             window.announced = [];
             const note = () => { if (announcer.textContent) announced.push(announcer.textContent); };
             const announcer = document.getElementById("announcer");
             new MutationObserver(note).observe(announcer, {childList: true, characterData: true, subtree: true});
           }"""
    )
    live.fill("#question", "Why?")
    live.press("#question", "Enter")
    for piece, shown in (("Because ", "Because"), ("of <p>the sun</p>[0.1, 0.", "Because of"), ("2].", "Because of")):
        live.evaluate("piece => live.send(piece)", piece)
        until(lambda shown=shown: live.inner_text(".answer").startswith(shown))
        assert live.get_attribute(".answer", "aria-busy") == "true"
        assert "[" not in live.inner_text(".answer")
    assert live.is_visible("#stop") and not live.is_visible("#send")
    live.evaluate("live.finish()")
    live.wait_for_selector(".turn[data-status=complete]")
    until(lambda: live.evaluate("announced.length"))
    live.wait_for_timeout(200)
    assert live.evaluate("announced") == ["Because of the sun1."]
    assert live.get_attribute(".answer", "aria-busy") == "false"
    assert re.fullmatch(
        r"5 tokens · [\d.]+ tokens/s · first token after \d+ ms · ended by the model \(stop\)",
        live.inner_text(".statistics"),
    )


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_keeps_what_was_said(live, way):
    live.fill("#question", "Why?")
    live.press("#question", "Enter")
    live.evaluate("live.send('Because of ')")
    until(lambda: "Because" in live.inner_text(".answer"))
    if way == "button":
        live.click("#stop")
    else:
        live.keyboard.press("Escape")
    live.wait_for_selector(".turn[data-status=stopped]")
    assert live.evaluate("live.aborted")
    assert live.inner_text(".answer") == "Because of"
    assert "stopped by you" in live.inner_text(".statistics")
    assert live.locator("#question").evaluate("field => field === document.activeElement")


def test_regenerate_edit_undo_clear(visit, ask):
    """Each changes the last turn only, and what is sent are the turns that are seen."""
    page = visit()
    answers = ScriptedAnswers(page, *(sse(text) for text in ("One.", "Two.", "Two again.", "Three.")))
    ask(page, "First?")
    ask(page, "Second?")
    page.get_by_role("button", name="Regenerate").press("Enter")
    until(lambda: page.locator(".answer").last.inner_text() == "Two again.")
    assert [message["content"] for message in answers.requests[-1]["messages"]] == ["First?", "One.", "Second?"]
    # The button is gone; the focus is not.
    until(lambda: page.evaluate("document.activeElement.id") == "question")
    page.get_by_role("button", name="Edit").click()
    assert page.input_value("#question") == "Second?" and page.is_visible("#editing")
    page.click("#cancel-edit")
    assert page.input_value("#question") == "" and page.locator(".turn").count() == 2
    page.get_by_role("button", name="Edit").click()
    ask(page, "Third?")
    assert page.locator(".question").all_inner_texts() == ["First?", "Third?"]
    assert [message["content"] for message in answers.requests[-1]["messages"]] == ["First?", "One.", "Third?"]
    page.get_by_role("button", name="Undo").click()
    assert page.locator(".question").all_inner_texts() == ["First?"]
    page.get_by_role("button", name="Restore").click()
    assert page.locator(".question").all_inner_texts() == ["First?", "Third?"]
    page.click("#clear")
    assert page.locator(".turn").count() == 0 and page.is_visible("#empty")
    page.get_by_role("button", name="Restore").click()
    assert page.locator(".answer").all_inner_texts() == ["One.", "Three."]


def test_copy_has_the_raw_answer(visit, ask):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    ScriptedAnswers(page, sse("<p>It</p>[0.1, 0.2] is **here**"))
    ask(page, "Where?").get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "<p>It</p>[0.1, 0.2] is **here**"


def test_parameters_begin_as_the_servers(visit, ask, card):
    """The card's defaults fill the fields; an empty field is left to the server."""
    defaults = {"temperature": 0.1, "top_p": 0.75, "max_tokens": 256, "seed": 1}
    page = visit(lambda page: card(page, defaults=defaults))
    answers = ScriptedAnswers(page, sse("Yes."))
    ask(page, "One?")
    assert {name: answers.requests[-1].get(name) for name in defaults} == defaults
    page.click("#parameters-button")
    page.fill("#temperature", "1.5")
    page.fill("#seed", "")
    ask(page, "Two?")
    assert answers.requests[-1]["temperature"] == 1.5 and "seed" not in answers.requests[-1]
    assert page.inner_text("#parameters-summary") == "temperature 1.5, seed unset"
    page.fill("#top-p", "7")
    page.fill("#question", "Three?")
    page.press("#question", "Enter")
    assert "Top-p" in page.inner_text("#notice-text") and len(answers.requests) == 2
    page.click("#defaults")
    ask(page, "Three?")
    assert {name: answers.requests[-1].get(name) for name in defaults} == defaults


@pytest.mark.parametrize("place", ["#empty-tasks", "#panel-tasks"])
def test_tasks_have_the_exact_prompts(visit, ask, place):
    page = visit()
    if place == "#panel-tasks":
        ScriptedAnswers(page, sse("Yes."))
        ask(page, "Is it?")
        page.click("#tasks-button")
    filled = []
    for i in range(len(PROMPTS)):
        if place == "#panel-tasks" and i:
            page.click("#tasks-button")
        page.click(f"{place} .task >> nth={i}")
        filled.append(page.input_value("#question"))
    assert filled == PROMPTS
    page.locator(f"{place} .task").nth(3).dispatch_event("click")
    assert page.evaluate("getSelection().toString()") == "blue backpack"


def test_tasks_ask_for_an_image(visit):
    page = visit()
    page.click("#empty-tasks .task")
    assert "add one" in page.inner_text("#notice-text")


# What goes wrong


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"status": 400, "body": json.dumps({"error": {"message": "top_p must be above 0"}})}, "top_p must be above 0"),
        ({"status": 502, "body": "<h1>Bad Gateway</h1>"}, "The server answered 502"),
        ({"status": 200, "body": sse("It is") + 'data: {"error": {"message": "out of memory"}}\n\n'}, "out of memory"),
        ({"status": 200, "body": sse("It is", finish=None)}, "ended before the answer was complete"),
        (None, "does not answer"),
    ],
    ids=["400", "502", "in the stream", "broken off", "unreachable"],
)
def test_errors_are_shown_in_place(visit, ask, answer, says):
    if answer and "out of memory" in says:
        answer["body"] = sse("It is", finish=None) + 'data: {"error": {"message": "out of memory"}}\n\ndata: [DONE]\n\n'
    page = visit()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer) if answer else route.abort())
    turn = ask(page, "What?")
    assert says in turn.locator(".error").inner_text()
    page.unroute("**/v1/chat/completions")
    answers = ScriptedAnswers(page, sse("Fine."))
    turn.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".turn[data-status=complete]")
    assert answers.requests[0]["messages"] == [{"role": "user", "content": "What?"}]


def test_connection_breaks_in_the_middle(live):
    live.fill("#question", "Why?")
    live.press("#question", "Enter")
    live.evaluate("live.send('Because ')")
    live.evaluate("live.fail()")
    live.wait_for_selector(".turn[data-status=failed]")
    assert "Because" in live.inner_text(".answer") and "connection broke" in live.inner_text(".error")


def test_key_is_asked_for_and_kept_in_the_tab(visit, ask):
    """A wrong one is asked for anew; the right one is in the tab's storage only, and survives a reload."""

    def guard(page):
        def check(route):
            if route.request.headers.get("authorization") == "Bearer right":
                return route.fallback()
            body = json.dumps({"error": {"message": "wrong key"}})
            return route.fulfill(status=401, content_type="application/json", body=body)

        page.route("**/v1/**", check)

    page = visit(guard, ready=False)
    page.wait_for_selector("#key-form:visible")
    page.fill("#question", "Is it?")
    assert page.is_disabled("#send")
    for key, hint in (("wrong", "This key was refused."), ("right", None)):
        page.fill("#key", key)
        page.press("#key", "Enter")
        if hint:
            until(lambda hint=hint: page.inner_text("#key-hint") == hint)
    page.wait_for_selector("#key-form", state="hidden")
    page.wait_for_selector("#send:enabled")
    assert ask(page, "what shape is in the image?").get_attribute("data-status") == "complete"
    stored = page.evaluate("[Object.values(sessionStorage).includes('right'), localStorage.length, document.cookie]")
    assert stored == [True, 0, ""]
    page.reload()
    page.wait_for_selector("#plate:visible")
    assert not page.is_visible("#key-form")


def test_waits_while_the_model_loads(visit):
    """The progress is shown, a question can be written, and is sent when the model is ready."""
    states = [{"status": "loading", "progress": "compiling 3 of 7"}]

    def load(page):
        def answer(route):
            if not states:
                return route.fallback()
            return route.fulfill(status=503, content_type="application/json", body=json.dumps(states[0]))

        page.route("**/health", answer)

    page = visit(load, ready=False)
    until(lambda: "compiling 3 of 7" in page.inner_text("#state-text"))
    assert page.inner_text("#empty-title") == "Loading the model" and not page.is_visible("#empty-tasks")
    page.fill("#question", "Is it?")
    assert page.is_disabled("#send")
    states.clear()
    page.wait_for_selector("#send:enabled")
    assert page.inner_text("#empty-title") == "Ask about an image" and page.is_visible("#empty-tasks")


def test_text_only_models_have_no_image_parts(visit, ask, card):
    page = visit(lambda page: card(page, image_size=None))
    answers = ScriptedAnswers(page, sse("Yes."))
    for part in ("#plate", "#empty-tasks", "#tasks-button"):
        assert not page.is_visible(part)
    ask(page, "Is it?")
    assert answers.requests[0]["messages"] == [{"role": "user", "content": "Is it?"}]
    paste(page, png((8, 8)))
    page.wait_for_selector("#notice:visible")
    assert "text only" in page.inner_text("#notice-text")
