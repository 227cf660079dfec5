"""Several turns: a KV cache that is kept must not change an answer."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from sphinx_jax.data.conversation import Conversation
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.errors import UserError
from sphinx_jax.inference.chat import Turn, chat_in_pipe, chat_on_terminal, save, typed_path

ASKED = ["what is the colour of the shape?", "is there a circle?", "why?"]


def answer_anew(model, turns, question, image):
    """The answer to a question after some turns, the whole prompt prefilled."""
    chat = model.chat(image, max_new_tokens=8)
    chat.turns = list(turns)
    return chat.ask(question)


@pytest.mark.parametrize("with_image", [True, False])
def test_later_turns_are_as_if_everything_was_prefilled_anew(model, images, with_image):
    image = images[0] if with_image else None
    chat = model.chat(image, max_new_tokens=8)
    for n, question in enumerate(ASKED):
        expected = answer_anew(model, chat.turns, question, image)
        assert "".join(chat.stream(question)) == expected
        assert chat.turns[n] == Turn(question, expected)


def test_a_stopped_answer_is_a_turn_and_the_chat_continues(model, images):
    chat = model.chat(images[1], max_new_tokens=8)
    pieces = chat.stream(ASKED[0])
    text = next(pieces) + next(pieces)
    pieces.close()
    assert chat.turns == [Turn(ASKED[0], text)]
    expected = answer_anew(model, chat.turns, ASKED[1], images[1])
    assert chat.ask(ASKED[1]) == expected


def test_reset_forgets_and_may_change_the_image(model, images):
    chat = model.chat(images[0], max_new_tokens=8)
    chat.ask(ASKED[0])
    chat.reset(model.prepare_image(images[2]))
    assert chat.turns == []
    assert chat.ask(ASKED[1]) == answer_anew(model, [], ASKED[1], images[2])


def test_a_conversation_that_grows_too_long_says_so_and_keeps_its_turns(model):
    chat = model.chat(max_new_tokens=8)
    chat.ask("why?")
    with pytest.raises(UserError, match="--max-model-len 512"):
        chat.ask("and what is more, " * 100)
    assert len(chat.turns) == 1
    assert chat.ask(ASKED[1]) == answer_anew(model, chat.turns[:1], ASKED[1], None)


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
    chat_on_terminal(chat, None, model.prepare_image)
    shown = capsys.readouterr().out
    assert "missing.png" in shown and "unknown command /frobnicate" in shown and "exists already" in shown
    assert "nothing to save" in shown and "/image FILE" in shown and "needs the name" in shown
    before, after, last = (json.loads((tmp_path / f"{n}.json").read_text())[0] for n in ("before", "after", "last"))

    def said(record):
        return [turn["value"] for turn in record["conversations"]]

    # An image that does not open changes nothing.
    assert said(before) == [ASKED[0], answer_anew(model, [], ASKED[0], None)] and "image" not in before
    assert after["image"] == str(tmp_path / "red.png")
    assert said(after) == [ASKED[1], answer_anew(model, [], ASKED[1], tmp_path / "red.png")]
    assert said(last) == [ASKED[2], answer_anew(model, [], ASKED[2], tmp_path / "red.png")]
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
    chat_on_terminal(chat, None, model.prepare_image)
    assert "(stopped)" in capsys.readouterr().out
    assert [turn.question for turn in chat.turns] == ASKED[:2]
    assert chat.turns[1].answer == answer_anew(model, chat.turns[:1], ASKED[1], None)


def test_a_pipe_gets_plain_text(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ASKED[0]}\n\n{ASKED[1]}\n"))
    chat = model.chat(max_new_tokens=8)
    chat_in_pipe(chat)
    assert capsys.readouterr().out == "".join(turn.answer + "\n" for turn in chat.turns)
    assert len(chat.turns) == 2


@pytest.mark.parametrize("wrong", ["/image ~nobody/x.png", "/save ~nobody/x", "/image a\0b.png", "/save " + 5000 * "x"])
def test_a_path_that_cannot_be_is_one_line_and_the_chat_continues(model, monkeypatch, capsys, wrong):
    chat = model.chat(max_new_tokens=2)
    monkeypatch.setattr("builtins.input", Keyboard(ASKED[0], wrong, ASKED[1]))
    chat_on_terminal(chat, None, model.prepare_image)
    assert [turn.question for turn in chat.turns] == ASKED[:2]
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 4 and "Traceback" not in out


@pytest.mark.parametrize("typed", ["'{}'", '"{}"', "{}", "\\ "], ids=["single", "double", "bare", "escaped"])
def test_paths_as_terminals_paste_them(tmp_path, typed):
    file = tmp_path / "a red :a: shape.png"
    Image.new("RGB", (3, 3)).save(file)
    text = str(file).replace(" ", typed) if typed == "\\ " else typed.format(file)
    assert typed_path(text) == file


def test_a_name_is_printed_as_it_is(model, monkeypatch, tmp_path, capsys):
    Image.new("RGB", (3, 3)).save(tmp_path / ":a:.png")
    monkeypatch.setattr("builtins.input", Keyboard(f"/image {tmp_path}/:a:.png"))
    chat_on_terminal(model.chat(max_new_tokens=2), None, model.prepare_image)
    assert ":a:.png" in capsys.readouterr().out


def test_a_pipe_survives_lines_that_are_no_text(model, monkeypatch, capsys):
    """A byte order mark belongs to no question; a line that is not UTF-8, or too long, is reported, others answered."""
    lines = b"\xef\xbb\xbf" + ASKED[0].encode() + b"\n\xff\xfe\n" + b"word " * 600 + b"\n" + ASKED[1].encode() + b"\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    chat = model.chat(max_new_tokens=4)
    chat_in_pipe(chat)
    out, err = capsys.readouterr()
    assert [turn.question for turn in chat.turns] == ASKED[:2]
    assert out == "".join(turn.answer + "\n" for turn in chat.turns)
    assert "line 2: not UTF-8" in err and "line 3: the prompt" in err and "Traceback" not in err


def test_a_saved_conversation_can_be_trained_on(model, tmp_path):
    from sphinx_jax.data import accessory_yaml

    chat = model.chat(max_new_tokens=4)
    chat.turns = [Turn("what is it?", "a circle")]
    save(chat, Path("cat.png"), tmp_path / "chat.json")
    (tmp_path / "data.yaml").write_text(f"META:\n  - path: {tmp_path}/chat.json\n    type: image_text\n")
    (item,) = accessory_yaml.read(tmp_path / "data.yaml", SkippedRecords(0.0)).items
    assert item.conversation.turns == Conversation.from_pairs([("what is it?", "a circle")]).turns
    assert item.image == str(Path("cat.png").absolute())
