"""What the page keeps: over a reload in the tab's storage, and for longer in a file of the training format."""

import json

import pytest

from sphinx_jax.data.conversation import Conversation
from sphinx_jax.inference import chat
from tests.server.page.browser import ScriptedAnswers, noise, png, sse, upload

pytestmark = pytest.mark.browser


def test_everything_survives_a_reload(visit, ask):
    data = png((60, 40))
    page = visit()
    ScriptedAnswers(page, sse("<p>Yes</p>[0.1, 0.2, 0.3, 0.4]."))
    page.set_input_files("#pick-file", upload(data, "kept.png"))
    ask(page, "Is it?")
    page.click("#parameters-button")
    page.fill("#temperature", "0.5")
    page.fill("#question", "a draft")
    page.reload()
    page.wait_for_selector("#send:enabled")
    assert page.locator(".question").all_inner_texts() == ["Is it?"]
    assert page.inner_text("#image-name") == "kept.png" and page.locator("#overlay rect.line").count() == 1
    assert page.input_value("#temperature") == "0.5" and page.input_value("#question") == "a draft"
    answers = ScriptedAnswers(page, sse("Still."))
    ask(page, "And now?")
    assert answers.image() == data and len(answers.requests[0]["messages"]) == 3


def test_image_too_large_to_keep_is_asked_for(visit, ask):
    """The tab's storage holds about 5 MB: the user is told, and continues with the file of that name."""
    data = noise((1400, 980))
    page = visit()
    ScriptedAnswers(page, sse("Yes."))
    page.set_input_files("#pick-file", upload(data, "huge.png"))
    page.wait_for_selector("#notice:visible")
    assert "huge.png is too large to be kept" in page.inner_text("#notice-text")
    ask(page, "Is it?")
    page.reload()
    page.wait_for_selector("#plate:visible")
    assert "about huge.png" in page.inner_text("#invite-lead")
    page.fill("#question", "More?")
    page.press("#question", "Enter")
    assert "Choose huge.png first" in page.inner_text("#notice-text")
    answers = ScriptedAnswers(page, sse("Still."))
    page.set_input_files("#pick-file", upload(data, "huge.png"))
    page.wait_for_selector("#stage:visible")
    ask(page, "More?")
    assert answers.image() == data and len(answers.requests[0]["messages"]) == 3


def test_save_writes_the_training_format(visit, ask, tmp_path):
    """What is saved is what train.py reads, and what is opened is what was saved."""
    page = visit()
    ScriptedAnswers(page, sse("Ja, 「はい」."), sse("<p>Here</p>[0.1, 0.2]."))
    page.set_input_files("#pick-file", upload(png((60, 40)), "cat.png"))
    ask(page, "Is it?")
    ask(page, "Where?")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "saved.json")
    (record,) = json.loads((tmp_path / "saved.json").read_text())
    assert record["image"] == "cat.png"
    conversation = Conversation.from_record(record["conversations"], "saved.json")
    expected = [("Is it?", "Ja, 「はい」."), ("Where?", "<p>Here</p>[0.1, 0.2].")]
    assert conversation == Conversation.from_pairs(expected)

    other = visit()
    other.set_input_files("#open-file", tmp_path / "saved.json")
    other.wait_for_selector(".turn >> nth=1")
    assert other.locator(".question").all_inner_texts() == ["Is it?", "Where?"]
    assert "about cat.png" in other.inner_text("#invite-lead")
    other.set_input_files("#pick-file", upload(png((60, 40)), "cat.png"))
    other.wait_for_selector("#stage:visible")
    assert other.locator(".turn").count() == 2 and other.locator("#overlay path.line").count() == 1


def test_opens_what_the_chat_saved(visit, tmp_path):
    """A file of infer.py's /save: its image is asked for by name, and its path is kept when saved anew."""
    path = saved_by_the_chat(tmp_path, [("Is it?", "Yes.")])
    page = visit()
    page.set_input_files("#open-file", path)
    page.wait_for_selector(".turn")
    page.set_input_files("#pick-file", upload(png((60, 40)), "cat.png"))
    page.wait_for_selector("#stage:visible")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(path.read_text())


def saved_by_the_chat(folder, pairs):
    """The file that /save of the chat on the terminal writes."""
    # Without a model: /save looks at the turns only.
    made = object.__new__(chat.Chat)
    made.turns = [chat.Turn(*pair) for pair in pairs]
    chat.save(made, folder / "photos" / "cat.png", folder / "chat.json")
    return folder / "chat.json"


BAD_FILES = {
    "{not json": "not JSON",
    "[]": 'no record with "conversations"',
    "null": 'no record with "conversations"',
    '[{"conversations": [{"from": "gpt", "value": "x"}]}]': 'turn 1 must have "from": "human"',
    '[{"conversations": [{"from": "human", "value": 3}]}]': "turn 1 must have",
    '[{"conversations": [null]}]': "turn 1 must have",
    '[{"conversations": [{"from": "human", "value": "x"}]}]': "has no answer",
    '[{"conversations": []}]': "has no answer",
    '[{"image": ["a", "b"], "conversations": []}]': '"image" must be',
}


def test_file_that_cannot_be_opened_changes_nothing(visit, ask):
    page = visit()
    ScriptedAnswers(page, sse("Yes."))
    ask(page, "Is it?")
    for text, says in BAD_FILES.items():
        page.set_input_files("#open-file", upload(text.encode(), "bad.json", "application/json"))
        page.wait_for_selector("#notice:visible")
        assert says in page.inner_text("#notice-text")
        assert page.locator(".turn").count() == 1
        page.click("#notice-close")


def test_opening_can_be_undone(visit, ask):
    """Restore brings back the conversation that was there, with its image."""
    page = visit()
    answers = ScriptedAnswers(page, sse("Yes."))
    data = png((60, 40))
    page.set_input_files("#pick-file", upload(data, "first.png"))
    ask(page, "Is it?")
    record = {"image": "other.png", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
    page.set_input_files("#open-file", upload(json.dumps([record, {}]).encode(), "other.json", "application/json"))
    page.wait_for_selector("#invite:visible")
    assert "first of 2" in page.inner_text("#notice-text") and page.locator(".question").all_inner_texts() == ["x"]
    page.get_by_role("button", name="Restore").click()
    assert page.inner_text("#image-name") == "first.png"
    page.reload()
    page.wait_for_selector("#stage:visible")
    page.wait_for_selector("#state[data-state=ready]")
    ask(page, "Still?")
    assert answers.image() == data and len(answers.requests[-1]["messages"]) == 3
