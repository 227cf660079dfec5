"""Several turns: what is kept must not change what is said."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from sphinx_jax.data.conversation import Conversation
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.errors import UserError
from sphinx_jax.inference.chat import Turn, chat_in_pipe, chat_on_terminal, save

ASKED = ["what is the colour of the shape?", "is there a circle?", "why?"]


def first_chunk(model, turns, question, image):
    """The answer to a question after some turns, everything read at once."""
    chat = model.chat(image, max_new_tokens=8)
    chat.turns = list(turns)
    return chat.ask(question)


@pytest.mark.parametrize("with_picture", [True, False])
def test_later_turns_with_the_kept_cache_are_as_if_read_afresh(model, images, with_picture):
    image = images[0] if with_picture else None
    chat = model.chat(image, max_new_tokens=8)
    for n, question in enumerate(ASKED):
        expected = first_chunk(model, chat.turns, question, image)
        assert "".join(chat.stream(question)) == expected
        assert chat.turns[n] == Turn(question, expected)


def test_a_stopped_answer_is_a_turn_and_the_chat_goes_on(model, images):
    chat = model.chat(images[1], max_new_tokens=8)
    pieces = chat.stream(ASKED[0])
    said = next(pieces) + next(pieces)
    pieces.close()
    assert chat.turns == [Turn(ASKED[0], said)]
    expected = first_chunk(model, chat.turns, ASKED[1], images[1])
    assert chat.ask(ASKED[1]) == expected


def test_reset_forgets_and_may_change_the_picture(model, images):
    chat = model.chat(images[0], max_new_tokens=8)
    chat.ask(ASKED[0])
    chat.reset(model.picture(images[2]))
    assert chat.turns == []
    assert chat.ask(ASKED[1]) == first_chunk(model, [], ASKED[1], images[2])


def test_a_conversation_that_outgrows_the_context_says_so_and_keeps_its_turns(model):
    chat = model.chat(max_new_tokens=8)
    chat.ask("why?")
    with pytest.raises(UserError, match="context of 512"):
        chat.ask("and what is more, " * 100)
    assert len(chat.turns) == 1
    assert chat.ask(ASKED[1]) == first_chunk(model, chat.turns[:1], ASKED[1], None)


class Keyboard:
    """Lines as typed; an exception in their place is raised."""

    def __init__(self, *lines):
        self.lines = iter(lines)

    def __call__(self, prompt):
        line = next(self.lines, None)
        if line is None:
            raise EOFError
        if isinstance(line, type):
            raise line
        return line


def test_commands_on_the_terminal(model, images, monkeypatch, tmp_path, capsys):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    keyboard = Keyboard(
        "/save empty.json",
        ASKED[0],
        "/image missing.png",
        f"/save {tmp_path}/before.json",
        f"/image {tmp_path}/red.png",
        ASKED[1],
        "/frobnicate",
        "/save",
        KeyboardInterrupt,
        "/help",
        f"/save {tmp_path}/after.json",
        f"/save {tmp_path}/after.json",
        "/reset",
        ASKED[2],
        f"/save {tmp_path}/last.json",
        "/quit",
        "never asked",
    )
    monkeypatch.setattr("builtins.input", keyboard)
    chat = model.chat(max_new_tokens=8)
    chat_on_terminal(chat, None, model.picture)
    shown = capsys.readouterr().out
    assert "missing.png" in shown and "unknown command /frobnicate" in shown and "exists already" in shown
    assert "nothing to save" in shown and "/image FILE" in shown and "needs the name" in shown
    before, after, last = (json.loads((tmp_path / f"{n}.json").read_text())[0] for n in ("before", "after", "last"))
    said = lambda record: [turn["value"] for turn in record["conversations"]]
    # A picture that does not open changes nothing.
    assert said(before) == [ASKED[0], first_chunk(model, [], ASKED[0], None)] and "image" not in before
    assert after["image"] == str(tmp_path / "red.png")
    assert said(after) == [ASKED[1], first_chunk(model, [], ASKED[1], tmp_path / "red.png")]
    assert said(last) == [ASKED[2], first_chunk(model, [], ASKED[2], tmp_path / "red.png")]
    assert next(keyboard.lines) == "never asked"


def test_ctrl_c_stops_the_answer_and_not_the_chat(model, monkeypatch, capsys):
    chat = model.chat(max_new_tokens=8)
    monkeypatch.setattr("builtins.input", Keyboard(ASKED[0], ASKED[1]))
    pushed = []

    from sphinx_jax.inference.stop_strings import TextStream

    original = TextStream.push

    def interrupted_once(self, tokens):
        pushed.append(tokens)
        if len(pushed) == 3:
            raise KeyboardInterrupt
        return original(self, tokens)

    monkeypatch.setattr(TextStream, "push", interrupted_once)
    chat_on_terminal(chat, None, model.picture)
    assert "(stopped)" in capsys.readouterr().out
    assert [turn.question for turn in chat.turns] == ASKED[:2]
    assert chat.turns[1].answer == first_chunk(model, chat.turns[:1], ASKED[1], None)


def test_a_pipe_gets_plain_text(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ASKED[0]}\n\n{ASKED[1]}\n"))
    chat = model.chat(max_new_tokens=8)
    chat_in_pipe(chat)
    assert capsys.readouterr().out == "".join(turn.answer + "\n" for turn in chat.turns)
    assert len(chat.turns) == 2


def test_a_saved_conversation_can_be_trained_on(model, tmp_path):
    from sphinx_jax.data import accessory_yaml

    chat = model.chat(max_new_tokens=4)
    chat.turns = [Turn("what is it?", "a circle")]
    save(chat, Path("cat.png"), tmp_path / "chat.json")
    (tmp_path / "data.yaml").write_text(f"META:\n  - path: {tmp_path}/chat.json\n    type: image_text\n")
    (item,) = accessory_yaml.read(tmp_path / "data.yaml", SkippedRecords(0.0)).items
    assert item.conversation.turns == Conversation.from_pairs([("what is it?", "a circle")]).turns
    assert item.image == str(Path("cat.png").absolute())
