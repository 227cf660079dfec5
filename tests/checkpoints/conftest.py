"""A small language model under Mistral's names, and the same in each layout, in plain numpy.

Nothing here uses the mappings or the reader under test. Only the file writers are shared, which tests/parity
checks against torch and safetensors.
"""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from sphinx_jax.checkpoints.io import safetensors_files, torch_files
from sphinx_jax.config import DecoderConfig, SphinxConfig

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LANGUAGE = DecoderConfig(
    dim=64, hidden_dim=48, num_layers=2, num_heads=16, num_kv_heads=8, num_experts=8, vocab_size=96, rope_theta=1e4
)


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def golden_text():
    """golden_text(name) -> the text of a reference file."""
    return lambda name: (GOLDEN / name).read_text()


@pytest.fixture
def config():
    return SphinxConfig(LANGUAGE, vision=None, balance_weight=0.02)


@pytest.fixture
def weights():
    """weights(seed, dtype) -> {name: array}, one tensor per expert and matrix, as Mistral first released them."""

    def make(seed: int = 0, dtype: np.dtype = BFLOAT16) -> dict[str, np.ndarray]:
        c, rng = LANGUAGE, np.random.default_rng(seed)

        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32).astype(dtype)

        tensors = {"tok_embeddings.weight": draw(c.vocab_size, c.dim)}
        for i in range(c.num_layers):
            layer = f"layers.{i}."
            for which, heads in (("wq", c.num_heads), ("wk", c.num_kv_heads), ("wv", c.num_kv_heads)):
                tensors[f"{layer}attention.{which}.weight"] = draw(heads * c.head_dim, c.dim)
            tensors[f"{layer}attention.wo.weight"] = draw(c.dim, c.num_heads * c.head_dim)
            for e in range(c.num_experts):
                expert = f"{layer}feed_forward.experts.{e}."
                tensors[f"{expert}w1.weight"] = draw(c.hidden_dim, c.dim)
                tensors[f"{expert}w2.weight"] = draw(c.dim, c.hidden_dim)
                tensors[f"{expert}w3.weight"] = draw(c.hidden_dim, c.dim)
            tensors[f"{layer}feed_forward.gate.weight"] = draw(c.num_experts, c.dim)
            tensors[f"{layer}attention_norm.weight"] = draw(c.dim)
            tensors[f"{layer}ffn_norm.weight"] = draw(c.dim)
        return tensors | {"norm.weight": draw(c.dim), "output.weight": draw(c.vocab_size, c.dim)}

    return make


@pytest.fixture
def ours():
    """ours(weights, unstacked) -> the parameter tree of them."""

    def layer(w: dict[str, np.ndarray], i: int) -> dict:
        c = LANGUAGE

        def get(name: str) -> np.ndarray:
            return w[f"layers.{i}.{name}.weight"]

        q, k, v = (get(f"attention.{which}").T for which in ("wq", "wk", "wv"))
        wqkv = np.zeros((c.dim, c.num_kv_heads, c.queries_per_kv + 2, c.head_dim), q.dtype)
        for head in range(c.num_heads):
            columns = slice(head * c.head_dim, (head + 1) * c.head_dim)
            wqkv[:, head // c.queries_per_kv, head % c.queries_per_kv] = q[:, columns]
        for head in range(c.num_kv_heads):
            columns = slice(head * c.head_dim, (head + 1) * c.head_dim)
            wqkv[:, head, -2], wqkv[:, head, -1] = k[:, columns], v[:, columns]
        experts = [f"feed_forward.experts.{e}" for e in range(c.num_experts)]
        w_in = np.stack([np.stack([get(f"{e}.w1").T, get(f"{e}.w3").T], axis=1) for e in experts])
        return {
            "attention": {
                "wqkv": wqkv,
                "wo": get("attention.wo").T.reshape(c.num_kv_heads, c.queries_per_kv, c.head_dim, c.dim),
            },
            "attention_norm": {"scale": get("attention_norm")},
            "ffn": {
                "router": get("feed_forward.gate").T,
                "w_in": w_in,
                "w_out": np.stack([get(f"{e}.w2").T for e in experts]),
            },
            "ffn_norm": {"scale": get("ffn_norm")},
        }

    def make(w: dict[str, np.ndarray], unstacked: bool) -> dict:
        layers = [layer(w, i) for i in range(LANGUAGE.num_layers)]
        return {
            "language": {
                "embedding": {"table": w["tok_embeddings.weight"]},
                "head": {"kernel": w["output.weight"].T},
                "layers": dict(enumerate(layers)) if unstacked else jax.tree.map(lambda *x: np.stack(x), *layers),
                "norm": {"scale": w["norm.weight"]},
            }
        }

    return make


@pytest.fixture
def same():
    """Asserts that two parameter trees have the same leaves, bit for bit."""

    def check(actual_tree, expected_tree) -> None:
        assert jax.tree.structure(actual_tree) == jax.tree.structure(expected_tree)
        for (path, actual), expected in zip(
            jax.tree_util.tree_leaves_with_path(actual_tree), jax.tree.leaves(expected_tree), strict=True
        ):
            actual, expected = np.asarray(actual), np.asarray(expected)
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), path
            assert actual.tobytes() == expected.tobytes(), path

    return check


def _sparse(w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The experts of a layer joined to one tensor a matrix, w2 transposed."""
    tensors = {name: tensor for name, tensor in w.items() if ".experts." not in name}
    for i in range(LANGUAGE.num_layers):
        stem = f"layers.{i}.feed_forward."
        for which in ("w1", "w2", "w3"):
            each = [w[f"{stem}experts.{e}.{which}.weight"] for e in range(LANGUAGE.num_experts)]
            tensors[stem + which] = np.concatenate([e.T if which == "w2" else e for e in each])
    return tensors


def _shard(name: str, tensor: np.ndarray, i: int, count: int) -> np.ndarray | None:
    """Shard i of `count`: fairscale's parallel layers, and the original's two layouts of experts."""
    if ".experts." in name:
        expert = int(name.split(".experts.")[1].split(".")[0])
        return tensor if expert // (LANGUAGE.num_experts // count) == i else None
    if name.endswith((".w1", ".w2", ".w3")):
        experts = tensor.reshape(LANGUAGE.num_experts, -1, tensor.shape[-1])
        return np.split(experts, count, axis=1)[i].reshape(-1, tensor.shape[-1])
    if name.endswith(("wq.weight", "wk.weight", "wv.weight", "output.weight")):
        return np.split(tensor, count, axis=0)[i]
    if name.endswith(("wo.weight", "tok_embeddings.weight")):
        return np.split(tensor, count, axis=1)[i]
    return tensor


def write_file(path, tensors: dict[str, np.ndarray]) -> None:
    """A .pth or .safetensors file of the tensors."""
    module = safetensors_files if path.suffix == ".safetensors" else torch_files
    with module.Writer(path, {name: (t.shape, t.dtype) for name, t in tensors.items()}) as file:
        for name, tensor in tensors.items():
            file.write(name, [tensor])


@pytest.fixture
def accessory_directory(tmp_path, weights):
    """accessory_directory(weights, shards, llama_type) -> path of a checkpoint as the original would save it."""

    def make(w=None, shards: int = 1, llama_type: str = "mixtral_sparse", name: str = "accessory"):
        path = tmp_path / name
        path.mkdir()
        w = weights() if w is None else w
        tensors = w if llama_type == "mixtral" else _sparse(w)
        for i in range(shards):
            in_shard = {f"llma.{key}": _shard(key, tensor, i, shards) for key, tensor in tensors.items()}
            file = path / f"consolidated.{i:02d}-of-{shards:02d}.model.pth"
            write_file(file, {key: tensor for key, tensor in in_shard.items() if tensor is not None})
        (path / "meta.json").write_text(json.dumps({"llama_type": llama_type}))
        (path / "config.json").write_text(json.dumps(MISTRAL_CONFIG | {"load_balancing_weight": 0.02}))
        (path / "tokenizer.model").write_bytes(b"a tokenizer")
        return path

    return make


MISTRAL_CONFIG = {
    "dim": 64,
    "hidden_dim": 48,
    "head_dim": 4,
    "n_layers": 2,
    "n_heads": 16,
    "n_kv_heads": 8,
    "vocab_size": 96,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}


@pytest.fixture
def mistral_directory(tmp_path, weights):
    """mistral_directory(style, suffix, files) -> path of Mistral's consolidated files.

    style "experts" is that of the first release, "block_sparse" that of the files on Hugging Face.
    """

    def make(style: str, suffix: str, files: int):
        path = tmp_path / "mistral"
        path.mkdir()
        tensors = weights()
        if style == "block_sparse":
            tensors = {k.replace("feed_forward", "block_sparse_moe"): v for k, v in _sparse(tensors).items()}
        names = list(tensors)
        for i in range(files):
            name = f"consolidated.{i:02d}.{suffix}" if suffix != "safetensors" else "consolidated.safetensors"
            write_file(path / name, {key: tensors[key] for key in names[i::files]})
        (path / "params.json").write_text(json.dumps(MISTRAL_CONFIG))
        return path

    return make


@pytest.fixture
def hugging_face_tensors():
    """hugging_face_tensors(weights) -> the same under transformers' names, rotary halves for pairs."""

    def make(w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        renamed = {}
        for name, tensor in w.items():
            if name.endswith(("wq.weight", "wk.weight")):
                heads = tensor.shape[0] // LANGUAGE.head_dim
                pairs = tensor.reshape(heads, LANGUAGE.head_dim // 2, 2, LANGUAGE.dim)
                tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
            for theirs, mistral in (
                ("model.embed_tokens", "tok_embeddings"),
                ("lm_head", "output"),
                ("input_layernorm", "attention_norm"),
                ("post_attention_layernorm", "ffn_norm"),
                ("block_sparse_moe", "feed_forward"),
                *((f"self_attn.{x}_proj", f"attention.w{x}") for x in "qkvo"),
            ):
                name = name.replace(mistral, theirs)
            renamed[name if name.startswith(("model.", "lm_head")) else f"model.{name}"] = tensor
        return renamed

    return make
