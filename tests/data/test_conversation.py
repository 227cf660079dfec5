"""Prompts, token ids, labels and truncation against what the original program computed."""

import dataclasses
import json
import random
import string

import numpy as np
import pytest

from sphinx_jax.data.conversation import DEFAULT_TEMPLATE, Conversation, Template, Turn, fit
from sphinx_jax.errors import UserError

with_echo = {"echo_bug", "echo_suffix_bug"}
ASSISTANT_SAYS = [21631, 28747]
HASHES = 27332

_CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAVA = (
    "You are LLaVA, a large language and vision assistant trained by UW Madison WAIV Lab."
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail."
)
TEMPLATES = {
    **dict.fromkeys(("default", "simple", "v1"), DEFAULT_TEMPLATE),
    "multimodal": Template(_LLAVA, "\n\n###", "Human", "Assistant", "\n###", "\n###"),
    "llava_v1": Template(_LLAVA, " ", "USER", "ASSISTANT", " ", "</s>"),
    "bair_v1": Template("BEGINNING OF CONVERSATION:", " ", "USER", "GPT", " ", "</s>"),
    "vicuna_v1_1": Template(_CHAT, " ", "USER", "ASSISTANT", " ", "</s>"),
}
"""The templates of the original, by name. SPHINX-MoE uses "default"."""


@pytest.fixture(scope="module")
def reference(golden):
    return golden("conversations.json")


@pytest.fixture(scope="module")
def items(reference):
    return {item["name"]: item for item in reference["items"]}


def by_borders(tokens: list[int]) -> list[int]:
    """Labels from the stored ids alone: what follows each "Assistant:", up to and with the next "###"."""
    labels, learning = [0] * len(tokens), False
    for i, token in enumerate(tokens):
        if learning:
            labels[i] = token
            learning = token != HASHES
        else:
            learning = tokens[i - 1 : i + 1] == ASSISTANT_SAYS
    return labels


NAMES = [
    *("single", "two_turn", "three_turn", "chinese", "mixed_emoji", "multiline_answer", "code", "echo_bug"),
    *("echo_suffix_bug", "whitespace", "empty_answer", "hash_answer", "box", "assistant_role", "ends_with_human"),
    *("number_value", "url", "image_tag_in_middle", "tab", "long"),
]


def test_every_item_is_tested(items):
    assert sorted(NAMES) == sorted(items)


@pytest.mark.parametrize("name", NAMES)
def test_text_tokens_and_labels(name, items, mixtral):
    item = items[name]
    conversation = Conversation.from_record(item["source"], name)
    assert conversation.text() == item["text"]
    has_loss = [segment.text for segment in conversation.segments() if segment.has_loss]
    assert [text.removeprefix(" ") for text in has_loss] == item["to_predict"]
    assert [mixtral.encode_segment(text) for text in has_loss] == item["to_predict_tokens"]
    example = conversation.example(mixtral)
    assert example.tokens.tolist() == item["tokens"] == item["untruncated"]["input"]
    if name in with_echo:
        # The original searches for the answer's tokens and finds them in the human's turn; we label the answer.
        assert example.labels.tolist() == by_borders(item["tokens"]) != item["untruncated"]["labels"]
    else:
        assert example.labels.tolist() == by_borders(item["tokens"]) == item["untruncated"]["labels"]


@pytest.mark.parametrize("name", NAMES)
def test_truncation_and_padding(name, items, mixtral):
    item = items[name]
    example = Conversation.from_record(item["source"], name).example(mixtral)
    cases = [value for value in item.values() if isinstance(value, dict)]
    assert len(cases) >= 5
    for case in cases:
        length = case["max_words"] - case["image_words"]
        labels = by_borders(item["tokens"])[:length]
        if name in with_echo and any(case.get("labels", ())) and not any(labels):
            # Only the wrongly labelled human turn is left in the original: here no token has loss.
            case = {"error": "LabelAllZeroError"}
        if "error" in case:
            with pytest.raises(
                UserError, match=f"^here: no token with loss is left: the first answer begins at .* {length}"
            ):
                fit(example, length + 7, 7, "here")
            continue
        got = fit(example, case["max_words"], case["image_words"], "here")
        assert len(got.tokens) == len(got.labels) == case["length"]
        assert got.tokens.dtype == got.labels.dtype == np.int32
        padding = [0] * (length - len(labels))
        assert got.tokens.tolist() == item["tokens"][:length] + padding
        assert got.labels.tolist() == labels + padding
        if "input" in case:
            assert got.tokens.tolist() == case["input"]
        if "input_tail8" in case:
            assert got.tokens.tolist()[-8:] == case["input_tail8"]
        if "labels" in case and name not in with_echo:
            assert got.labels.tolist() == case["labels"]
        if "labels_tail8" in case and name not in with_echo:
            assert got.labels.tolist()[-8:] == case["labels_tail8"]


def test_more_image_tokens_than_the_limit_is_an_error(items, reference, mixtral):
    case = reference["max_words_512_with_image_words_1455"]
    assert case["error"] == "LabelAllZeroError"
    example = Conversation.from_record(items["single"]["source"], "single").example(mixtral)
    with pytest.raises(UserError, match=r"cat.png: the image takes 1455 positions and the limit is 512"):
        fit(example, case["max_words"], case["image_words"], "cat.png")


def test_prompts(reference, mixtral):
    for case in reference["prompts"]:
        conversation = Conversation.from_pairs(map(tuple, case["qas"]))
        assert conversation.prompt() == case["prompt"]
        assert conversation.prompt_tokens(mixtral) == case["tokens"]


def test_a_prefix_has_the_tokens_of_the_whole_text(reference, mixtral):
    for case in reference["prompts"]:
        *earlier, (question, _) = map(tuple, case["qas"])
        prefixed = Conversation.from_pairs([*earlier, (question, None)]).prompt_tokens(mixtral, " The answer is")
        assert prefixed == mixtral.encode(case["prompt"] + " The answer is", bos=True, eos=False)
        trained = Conversation.from_pairs([*earlier, (question, "The answer is B.")]).example(mixtral).tokens.tolist()
        assert trained[: len(prefixed)] == prefixed and len(trained) > len(prefixed) > len(case["tokens"])


def test_templates(reference):
    assert set(TEMPLATES) == set(reference["templates"])
    for name, case in reference["templates"].items():
        template = TEMPLATES[name]
        conversation = Conversation.from_pairs([("Q one", "A one"), ("Q two", None)], template)
        assert conversation.prompt() == case["process"]["conv"], name
        has_loss = [segment.text for segment in conversation.segments() if segment.has_loss]
        assert [text.removeprefix(" ") for text in has_loss] == case["process"]["to_predict"], name
        assert template.response_end_signal == case["response_end_signal"], name
    assert TEMPLATES["default"].response_end_signal == reference["response_end_signal"]


@pytest.mark.parametrize("tokenizer", ["mixtral", "small"])
def test_segments_give_the_ids_of_the_whole_text(tokenizer, request):
    """Over hostile texts, all templates, and turns in any order."""
    tokenizer = request.getfixturevalue(tokenizer)
    random_ = random.Random(0)
    alphabet = [
        *string.ascii_letters,
        *"      \n\n##:.,é中🐱▁▁\t\x00\u00a0\u3000",
        "###",
        "Human:",
        " Assistant:",
        "</s>",
        "USER",
    ]
    for _ in range(400):
        turns = tuple(
            Turn(random_.choice(["human", "assistant"]), "".join(random_.choices(alphabet, k=random_.randrange(12))))
            for _ in range(random_.randrange(1, 6))
        )
        conversation = Conversation(turns, random_.choice(list(TEMPLATES.values())))
        whole = tokenizer.encode(conversation.text(), bos=True, eos=True)
        assert conversation.example(tokenizer).tokens.tolist() == whole, conversation


def test_a_conversation_without_an_answer_has_no_loss(mixtral):
    example = Conversation.from_pairs([("Anyone?", None)]).example(mixtral)
    with pytest.raises(UserError, match="no answer"):
        fit(example, 100, 0, "here")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ([], "list of at least one turn"),
        (None, "list of at least one turn"),
        ("hello", "list of at least one turn"),
        ({"from": "human"}, "list of at least one turn"),
        ([[]], 'turn 0: needs "from" and "value"'),
        ([{"from": "human"}], 'turn 0: needs "from" and "value"'),
        ([{"from": "human", "value": "a"}, {"from": "system", "value": "b"}], "turn 1: is from 'system'"),
        ([{"from": {"a": 1}, "value": "b"}], "turn 0: is from"),
        ([{"from": "gpt", "value": None}], "turn 0: .* must be text"),
        ([{"from": "gpt", "value": True}], "turn 0: .* must be text"),
        ([{"from": "gpt", "value": ["a"]}], "turn 0: .* must be text"),
        (json.loads(r'[{"from": "gpt", "value": "a\ud800"}]'), "turn 0: .* surrogate"),
    ],
)
def test_malformed_records_are_named(source, complaint):
    with pytest.raises(UserError, match=f"^file.json, record 3.*{complaint}"):
        Conversation.from_record(source, "file.json, record 3")


@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "What is it?\n<image>", "<image> What is it? <image>"])
def test_image_marks_are_dropped_in_inference_as_in_training(question, mixtral):
    plain = Conversation.from_pairs([("What is it?", None)])
    assert Conversation.from_pairs([(question, None)]).prompt_tokens(mixtral) == plain.prompt_tokens(mixtral)
    record = [{"from": "human", "value": question}, {"from": "gpt", "value": "A cat."}]
    assert Conversation.from_record(record, "") == Conversation.from_pairs([(question, "A cat.")])
    later = Conversation.from_pairs([("One?", "1"), (question, None)])
    assert later == Conversation.from_pairs([("One?", "1"), ("What is it?", None)])


def test_a_system_text_takes_the_place_of_the_templates():
    default = Conversation.from_pairs([("Why?", None)])
    own = dataclasses.replace(default, system="You are terse.")
    assert own.prompt() == default.prompt().replace(DEFAULT_TEMPLATE.system, "You are terse.")
    with pytest.raises(UserError, match="ends a turn"):
        dataclasses.replace(default, system="x\n### Assistant: y").check_forged_turns()
