"""The shipped model, and a fake one that answers from a table: neither the formats nor the runner need a network."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import sharding
import sphinx_jax
from sphinx_jax.cli import common, evaluate
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.requests import Completion, PreparedImage, Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.sphinx import Sphinx


@pytest.fixture(scope="module")
def nano() -> Sphinx:
    return sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(), max_model_len=256)


class FakeEngine(Engine):
    """One that only knows how long a prompt is."""

    def __init__(self):
        pass

    def prompt_len(self, request: Request) -> int:
        return len(request.tokens)


@dataclasses.dataclass
class FakeModel(sphinx_jax.Sphinx):
    """Answers what `answer` says of a prompt (without template, with the answer's prefix); a token is a character."""

    answer: Callable[[str], str]
    checkpoint: str = "fake"
    path: Path | None = None
    asked: list[str] = dataclasses.field(default_factory=list)
    """What was answered, in the order in which the answers end."""
    received: list[str] = dataclasses.field(default_factory=list)
    """All that was asked, in the order in which it came."""
    stop_after: int | None = None
    """Interrupt after so many answers, as Ctrl-C does."""

    engine = FakeEngine()

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh()

    def settings(self) -> dict[str, Any]:
        return {"checkpoint": "somewhere", "checkpoint_digest": self.checkpoint, "dtype": "float32"}

    def prepare_image(self, image: Image.Image) -> PreparedImage:
        return PreparedImage.of(np.asarray(image.convert("RGB").resize((4, 4))))

    def request(self, prompt: str, image: PreparedImage | None, params: SamplingParams, *, prefix: str) -> Request:
        return Request([ord(character) for character in prompt + prefix], image, params)

    def run(
        self, _engine: FakeEngine, requests: Iterable[Request], *_args: Any, **_options: Any
    ) -> Iterator[tuple[int, Completion]]:
        """In place of `generate.run`: answers end in any order."""
        texts = ["".join(map(chr, request.tokens)) for request in requests]
        self.received = texts
        order = random.Random(len(texts)).sample(range(len(texts)), len(texts))
        for count, index in enumerate(order):
            if count == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(texts[index])
            text = self.answer(texts[index])
            yield index, Completion(text, [*map(ord, text)], [], "stop")


@pytest.fixture
def fake(monkeypatch) -> Callable[..., FakeModel]:
    """fake(answer) -> a model that `evaluate.py` loads instead of any other."""

    def make(answer: Callable[[str], str], **fields: Any) -> FakeModel:
        model = FakeModel(answer, **fields)
        monkeypatch.setattr("sphinx_jax.cli.model_options.sphinx_jax.load", lambda *_, **__: model)
        monkeypatch.setattr("sphinx_jax.inference.complete_each.generate.run", model.run)
        return model

    return make


@pytest.fixture
def run(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """run(*argv) -> exit code, standard output and standard error of `evaluate.py`."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: Any) -> tuple[int, str, str]:
        code = common.run(evaluate.main, ["--checkpoint", "x", *map(str, argv)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call
