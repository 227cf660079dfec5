"""Records in the chat format and imagefolders against the same conversations in the original's format."""

import base64
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from sphinx_jax.data import accessory_yaml
from sphinx_jax.data.batching import ItemReader
from sphinx_jax.data.conversation import Conversation, Turn
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.data.tasks import split_held_out
from sphinx_jax.errors import UserError


def item_of(folder, record, **entry):
    """The one item of a file with one record."""
    (folder / "a.json").write_text(json.dumps([record]))
    entry = {"path": str(folder / "a.json"), "type": "t"} | entry
    (folder / "data.yaml").write_text(yaml.safe_dump({"META": [entry]}))
    (item,) = accessory_yaml.read(folder / "data.yaml", SkippedRecords(0)).items
    return item


def turns(*texts):
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(value):
    return {"type": "text", "text": value}


def url(value):
    return {"type": "image_url", "image_url": {"url": value}}


ANSWER = {"role": "assistant", "content": "A cat."}
LLAVA = {"image": "cat.png", "conversations": turns("<image>\nWhat is this?", "A cat.")}
SAME = {
    "OpenAI": {"messages": [user(url("cat.png"), text("What is this?")), ANSWER]},
    "a file: URL": {"messages": [user(url("file://cat.png"), text("What is this?")), ANSWER]},
    "a path": {"messages": [user({"type": "image", "path": "cat.png"}, text("What is this?")), ANSWER]},
    "a placeholder": {"messages": [user({"type": "image"}, text("What is this?")), ANSWER], "images": ["cat.png"]},
    "an image beside": {"messages": [{"role": "user", "content": "What is this?"}, ANSWER], "image": "cat.png"},
    "named twice": {"messages": [user(url("cat.png"), text("What is this?")), ANSWER], "images": ["cat.png"]},
    "parts": {"messages": [user(url("cat.png")), user(text("What is this?")), ANSWER]},
    "a row": {"file_name": "cat.png", "question": "What is this?", "answer": "A cat."},
}


@pytest.mark.parametrize("name", SAME)
def test_a_record_is_the_same_conversation(name, tmp_path, mixtral):
    expected, found = item_of(tmp_path, LLAVA, root="images"), item_of(tmp_path, SAME[name], root="images")
    assert found.image == expected.image == "images/cat.png"
    for ours, theirs in zip(found.conversation.example(mixtral), expected.conversation.example(mixtral), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_several_turns_and_a_system_text(tmp_path, mixtral):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which?"},
        {"role": "user", "content": "Of two."},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": [text("It"), text("fits.")]},
    ]
    found = item_of(tmp_path, {"messages": messages}).conversation
    said = (
        Turn("human", "Which?\nOf two."),
        Turn("assistant", "This."),
        Turn("human", "Why?"),
        Turn("assistant", "It\nfits."),
    )
    expected = Conversation(said, system="Be brief.")
    np.testing.assert_array_equal(found.example(mixtral).tokens, expected.example(mixtral).tokens)
    shown = mixtral.decode([int(token) for token in found.example(mixtral).labels if token])
    assert "This." in shown and "It\nfits." in shown and "Which" not in shown and "brief" not in shown


def imagefolder(folder, rows, **entry):
    folder.mkdir()
    for i, row in enumerate(rows):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    file = folder.parent / "data.yaml"
    file.write_text(yaml.safe_dump({"META": [{"path": str(folder), "type": "t"} | entry]}))
    return file


def first_pixel(item, tokenizer):
    image = ItemReader(tokenizer, 128, 8, 4, SkippedRecords(0)).image(item)
    assert image is not None
    return image[0, 0].tolist()


def test_an_imagefolder_with_texts(tmp_path, mixtral):
    rows = [{"file_name": f"{i}.png", "text": f"number {i}"} for i in range(3)]
    file = imagefolder(tmp_path / "images", rows, prompt="Which number?")
    items = accessory_yaml.read(file, SkippedRecords(0)).items
    for i, item in enumerate(items):
        assert item.conversation.turns == (Turn("human", "Which number?"), Turn("assistant", f"number {i}"))
        assert first_pixel(item, mixtral) == [i, 0, 0]
    imagefolder(tmp_path / "more", rows)
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 1: has a text and no question; .* prompt"):
        accessory_yaml.read(file, SkippedRecords(0))


def test_an_image_in_the_record(tmp_path, mixtral):
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "a.png")
    inside = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    item = item_of(tmp_path, {"messages": [user(url(inside), text("What?")), ANSWER]}, root="elsewhere")
    assert first_pixel(item, mixtral) == [9, 8, 7]


def test_what_is_judged_is_never_trained_on(tmp_path):
    """A file listed twice, in two formats and through a link, and several records about one image."""
    rows = [{"file_name": f"{i % 20}.png", "question": f"Which {i}?", "answer": "A"} for i in range(60)]
    file = imagefolder(tmp_path / "images", rows)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    records = [
        {"messages": [user(url(row["file_name"]), text(row["question"])), {"role": "assistant", "content": "B"}]}
        for row in rows
    ]
    (tmp_path / "again.json").write_text(json.dumps(records))
    entries = [
        {"path": str(tmp_path / "images"), "type": "t"},
        {"path": str(tmp_path / "images"), "type": "t"},
        {"path": str(tmp_path / "again.json"), "type": "u", "root": str(tmp_path / "link")},
    ]
    file.write_text(yaml.safe_dump({"META": entries}))
    train, held_out = split_held_out(accessory_yaml.read(file, SkippedRecords(0)), file)
    names = [{str(item.image).rpartition("/")[2] for item in part.items} for part in (train, held_out)]
    assert len(names[1]) == 2 and not names[0] & names[1]
    assert len(train.items) + len(held_out.items) == 180


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, '"messages" must be a list of at least one message'),
        ({"messages": ["hi"]}, 'message 0: needs "role" and "content"'),
        ({"messages": [{"role": "tool", "content": "x"}]}, "has the role 'tool'; use"),
        ({"messages": [user({"type": "audio"}), ANSWER]}, 'a part must be of type "text", "image_url" or "image"'),
        ({"messages": [user(url(3)), ANSWER]}, "an image must be the path of a file or a data: URL, got 3"),
        ({"messages": [user(url("a.png"), url("b.png")), ANSWER]}, "has 2 images, and the model looks at one"),
        ({"messages": [user(text(None)), ANSWER]}, "message 0: must be text, got None"),
        ({"messages": [user(text("\ud800")), ANSWER]}, "half a surrogate pair"),
        ({"messages": [user(text("Why?"))]}, "there is no answer"),
        ({"messages": [user(text("Why?")), ANSWER], "images": "a.png"}, '"images" must be a list'),
        ({"file_name": "a.png"}, 'needs "messages", "conversations"'),
    ],
)
def test_a_malformed_record_is_named(record, message, tmp_path):
    with pytest.raises(UserError) as raised:
        item_of(tmp_path, record)
    assert message in str(raised.value) and "a.json, record 0" in str(raised.value)


def test_a_directory_needs_its_metadata(tmp_path):
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"META": [{"path": str(tmp_path), "type": "t"}]}))
    with pytest.raises(UserError, match=r"a directory of records needs a metadata\.jsonl"):
        accessory_yaml.read(tmp_path / "data.yaml", SkippedRecords(0))
