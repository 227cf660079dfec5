"""The forms of Mixtral checkpoints that transformers loads: the same logits from its files, and from ours."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints.formats import mixtral
from sphinx_jax.model import bind

torch = pytest.importorskip("torch", reason="the reference is transformers on torch: install the parity extra")
transformers = pytest.importorskip("transformers", reason="the reference: install the parity extra")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="the reference: install the parity extra")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
MESHES = [{}, {"tensor": 2, "expert": 2, "fsdp": 2}]
NO_ROPE = {"rope_parameters": None, "rope_theta": None, "rope_scaling": None}


def rename(old: str, new: str):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def with_head(scale: float):
    """The output head in the file too, equal to the embedding times `scale`."""

    def edit(tensors: dict) -> dict:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * scale}

    return edit


def head_alone(tensors: dict) -> dict:
    return {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()}


def with_biases(tensors: dict) -> dict:
    projections = [f"model.layers.{i}.self_attn.{which}_proj" for i in range(2) for which in "qkvo"]
    biases = {f"{name}.bias": torch.ones(tensors[f"{name}.weight"].shape[0]) for name in projections}
    return tensors | biases | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


FORMS = {
    "head_dim": ({"head_dim": 24}, {}, None),
    "grouped queries of a wide head": ({"head_dim": 32, "num_key_value_heads": 2}, {}, None),
    "vocabulary of 97": ({"vocab_size": 97}, {}, None),
    "vocabulary of 98": ({"vocab_size": 98}, {}, None),
    "tied without a head": ({"tie_word_embeddings": True}, {}, None),
    "tied with the same head": ({"tie_word_embeddings": True}, {}, with_head(1.0)),
    "tied with another head": ({"tie_word_embeddings": True}, {}, with_head(-0.5)),
    "tied without an embedding": ({"tie_word_embeddings": True}, {}, head_alone),
    "tied vocabulary of 98": ({"tie_word_embeddings": True, "vocab_size": 98}, {}, None),
    "experts fused": ({}, {"save_original_format": False}, None),
    "experts fused in a vocabulary of 97": ({"vocab_size": 97}, {"save_original_format": False}, None),
    "experts under mlp": ({}, {}, rename(".block_sparse_moe.", ".mlp.")),
    "attention biases": ({"attention_bias": True}, {}, with_biases),
    "sliding window of the length": ({"sliding_window": 33}, {}, None),
    "sliding window of the context": ({"sliding_window": 4096, "max_position_embeddings": 4096}, {}, None),
    "swish": ({"hidden_act": "swish"}, {}, None),
}

# Edits of config.json, None for a key that is left out.
CONFIGS = {
    "theta of its own": NO_ROPE | {"rope_theta": 2e4},
    "no theta": NO_ROPE,
    "rope_scaling default": NO_ROPE | {"rope_theta": 3e4, "rope_scaling": {"type": "default"}},
    "rope_scaling default by its new name": NO_ROPE | {"rope_theta": 3e4, "rope_scaling": {"rope_type": "default"}},
    "rope_scaling with theta": NO_ROPE | {"rope_theta": 3e4, "rope_scaling": {"type": "default", "rope_theta": 7e4}},
    "rope_scaling and rope_parameters": {
        "rope_theta": 3e4,
        "rope_scaling": {"rope_type": "default", "rope_theta": 7e4},
        "rope_parameters": {"rope_type": "default", "rope_theta": 9e4},
    },
    "rope_parameters without theta": NO_ROPE | {"rope_theta": 4e4, "rope_parameters": {"rope_type": "default"}},
    "rope_parameters without anything": NO_ROPE | {"rope_theta": 4e4, "rope_parameters": {}},
    "rope_parameters with theta alone": NO_ROPE | {"rope_parameters": {"rope_theta": 5e4}},
    "rope_parameters beside another theta": NO_ROPE
    | {"rope_theta": 4e4, "rope_parameters": {"rope_type": "default", "rope_theta": 6e4}},
    "key/value heads left out": {"num_key_value_heads": None},
    "experts by their other name": {"num_local_experts": None, "num_experts": 4},
    "eps left out": {"rms_norm_eps": None},
}


def random_model(**sizes):
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES | sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def logits_of_transformers(path, tokens) -> np.ndarray:
    model = transformers.MixtralForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def our_logits(loaded, tokens) -> np.ndarray:
    vocab_size = loaded.config.language.vocab_size
    with sharding.mesh_context(loaded.mesh):
        run = jax.jit(lambda params, tokens: bind(loaded.graph, params)(tokens)[0])
        logits = np.asarray(run(loaded.params, jnp.asarray(tokens)))
    # Padding is no token.
    assert (logits[..., vocab_size:] == np.finfo(np.float32).min).all()
    return logits[..., :vocab_size]


def check_both_directions(path, tmp_path) -> None:
    """Our logits of `path` on every mesh, and transformers' logits of what we save, are transformers' of `path`."""
    vocab_size = json.loads((path / "config.json").read_text())["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocab_size, (2, 33))
    expected = logits_of_transformers(path, tokens)
    for shape in MESHES:
        loaded = checkpoints.load(path, sharding.make_mesh(**shape), unstacked=False)
        assert relative_error(our_logits(loaded, tokens), expected) < 1e-5
    mixtral.save(tmp_path / "ours", loaded.config, loaded.params)
    assert relative_error(logits_of_transformers(tmp_path / "ours", tokens), expected) < 1e-6
    checkpoints.save(tmp_path / "native", loaded.config, loaded.params, b"a tokenizer")
    native = checkpoints.load(tmp_path / "native", sharding.make_mesh(tensor=4, fsdp=2), unstacked=True)
    assert native.config == loaded.config
    assert relative_error(our_logits(native, tokens), expected) < 1e-5


def relative_error(actual, expected) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_files(form, tmp_path):
    sizes, how, edit = FORMS[form]
    path = tmp_path / "theirs"
    random_model(**sizes).save_pretrained(path, **how)
    if edit:
        file = path / "model.safetensors"
        safetensors_torch.save_file(edit(safetensors_torch.load_file(file)), file, metadata={"format": "pt"})
    check_both_directions(path, tmp_path)


@pytest.mark.parametrize("form", CONFIGS)
def test_forms_of_the_config(form, tmp_path):
    path = tmp_path / "theirs"
    random_model(rope_parameters={"rope_type": "default", "rope_theta": 1e4}).save_pretrained(path)
    file = path / "config.json"
    values = json.loads(file.read_text()) | CONFIGS[form]
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    check_both_directions(path, tmp_path)


def test_biases_that_are_not_zero_are_reported(tmp_path, caplog):
    random_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    safetensors_torch.save_file(with_biases(safetensors_torch.load_file(file)), file, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        checkpoints.open(tmp_path)
    assert "8 biases of attention" in caplog.text
