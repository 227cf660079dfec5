"""A small model of text with random weights, and two sets of adapters of it: a LoRA run, and a PEFT directory."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from sphinx_jax import checkpoints, config
from sphinx_jax.checkpoints import lora
from sphinx_jax.checkpoints.formats import peft
from sphinx_jax.checkpoints.loaded_model import abstract_adapters
from sphinx_jax.config import LoraConfig, SphinxConfig
from sphinx_jax.data.conversation import Conversation
from sphinx_jax.data.tokenizer import train_tokenizer
from sphinx_jax.model import SphinxMoE

DECODER = dataclasses.replace(config.nano().language, dim=16, hidden_dim=32, num_heads=4, num_kv_heads=2)
CONFIG = SphinxConfig(language=DECODER, vision=None)
MINE = LoraConfig(rank=3, alpha=4.5)
THEIRS = LoraConfig(rank=2, alpha=4.0, target_modules="attention")


def save_base(folder: Path) -> Path:
    """The model, in FOLDER/base, with a tokenizer of digits and the prompt template."""
    texts = [f"{i} plus {i % 7}?" for i in range(200)] + [Conversation.from_pairs([("plus", "9")]).text()] * 9
    _, abstract = sharding.abstract_params(lambda rngs: SphinxMoE(CONFIG, rngs=rngs), sharding.make_mesh())
    params = _random(abstract, 0, 0.3)
    checkpoints.save(folder / "base", CONFIG, params, train_tokenizer(texts, DECODER.vocab_size))
    return folder / "base"


def save_adapters(base: Path) -> dict[str, Path]:
    """ "mine", a run on attention and experts, and "theirs", PEFT's of another rank on attention alone; next to it."""
    _save_run(base, base.with_name("run"), MINE, seed=1)
    _save_run(base, base.with_name("other"), THEIRS, seed=2)
    peft.write(base.with_name("peft"), DECODER, lora.read_run(base.with_name("other"), CONFIG), base)
    return {"mine": base.with_name("run"), "theirs": base.with_name("peft")}


def _save_run(base: Path, path: Path, adapted: LoraConfig, seed: int) -> None:
    path.mkdir()
    lora.write_adapter_info(path, checkpoints.open(base), adapted)
    lora.save(path, _random(abstract_adapters(CONFIG, adapted), seed, 0.5))


def _random(abstract: Any, seed: int, deviation: float) -> Any:
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda leaf: jnp.asarray(deviation * draw(size=leaf.shape), jnp.float32), abstract)
