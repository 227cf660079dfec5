"""No phrase that a term of the field replaces (the glossary of CONTRIBUTING.md) in code, help texts or docs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

_WORD_FOR_TOKEN = "image|patch|next|a|the|each|per|of|many|so many|two|one|few|more|prompt"

FORBIDDEN = {
    r"pictures?": "image",
    rf"(?:{_WORD_FOR_TOKEN}) words?": "token, image token",
    r"(?:image|view)_words": "num_image_tokens, tokens_per_crop",
    r"read(?:s|ing)? (?:(?:a|the|each|its|of|in) )?prompts?": "prefill",
    r"read(?:s|ing)? on": "prefill a further chunk",
    # "apart from" is plain English; everything else meant layers that are not stacked.
    r"(?:held )?apart(?!\s+from\b)": "unstacked",
    r"exchange[ds]?|exchanging": "collective, all-reduce, all-gather",
    r"sent round": "collective, all-reduce, all-gather",
    r"add(?:ed|ing|s)? up (?:over|among|between) devices": "all-reduce",
    r"add(?:ed|ing|s)? up over": "all-reduce",
    r"what learns": "trainable",
    r"NOT_LEARNED": "IGNORE_INDEX",
    r"(?:in (?:so )?)?few bits": "quantized, weight-only int8 / int4",
    r"computed again for the gradient": "rematerialisation",
    r"rows of the (?:engine|state)": "sequences, batch slots",
    r"in the making": "sequences, batch slots",
    r"no Hopper": "non-Hopper",
    r"scores of the (?:next )?(?:word|token)": "logits",
}
"""Phrase, case-insensitive and between word boundaries, to the term that replaces it. A space matches a line break."""

_SPACE = r"(?:\s|#)+"

PATTERNS = {
    re.compile(r"\b(?:" + phrase.replace(" ", _SPACE) + r")\b", re.IGNORECASE): term
    for phrase, term in FORBIDDEN.items()
}

ALLOWED = {
    # Questions of a data set, which are text, of words.
    "sphinx_jax/data/easy_vqa_phrasings.py": ("picture", "two words"),
}
"""Phrases that one file may use."""


def checked_files() -> list[Path]:
    """Everything that a user or a reader of the code meets: packages, entry points, docs."""
    trees = [path for name in ("sphinx_jax", "sharding", "docs") for path in (ROOT / name).rglob("*")]
    files = [path for path in trees if path.suffix in (".py", ".md")] + [ROOT / "README.md", *ROOT.glob("*.py")]
    return sorted(files)


def violations(text: str) -> list[tuple[int, str, str]]:
    """(line, phrase, the term instead) for each forbidden phrase in `text`."""
    found = []
    for pattern, term in PATTERNS.items():
        for match in pattern.finditer(text):
            found.append((text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), term))
    return sorted(found)


def test_no_forbidden_phrase():
    """Reports file:line, the phrase and its replacement."""
    report = []
    for file in checked_files():
        name = file.relative_to(ROOT).as_posix()
        for line, phrase, term in violations(file.read_text(encoding="utf-8")):
            if phrase.lower() not in ALLOWED.get(name, ()):
                report.append(f"{name}:{line}: {phrase!r}: write {term}")
    assert not report, f"{len(report)} phrases that the glossary replaces:\n" + "\n".join(report)


@pytest.mark.parametrize(
    "text",
    [
        "Ask about a picture",
        "Pictures stand after BOS",
        "one vector of each image\nword",
        "reading a prompt",
        "the prompt is read in pieces, and reading on",
        "layers held apart",
        "mode(apart=True)",
        "exchanged along fsdp",
        "kept in few bits",
        "NOT_LEARNED = -100",
        "cards that are no Hopper",
    ],
)
def test_forbidden_phrases_are_found(text):
    assert violations(text)


@pytest.mark.parametrize(
    "text",
    [
        "a keyword argument, and sentences word by word",
        "apart from the embedding",
        "read one prompt file",
        "preads only what it needs",
        "the exchangeable part",
        "password words",
    ],
)
def test_plain_english_passes(text):
    assert not violations(text)
