"""Directories of PEFT that are damaged, of another model, or adapt what has no adapters here."""

import dataclasses
import json

import numpy as np
import pytest

import sphinx_jax
from sphinx_jax import checkpoints, config
from sphinx_jax.checkpoints import adapters
from sphinx_jax.checkpoints.formats import peft
from sphinx_jax.checkpoints.io import safetensors_files
from sphinx_jax.checkpoints.source import Adapters
from sphinx_jax.errors import UserError

DECODER = dataclasses.replace(config.nano().language, dim=16, hidden_dim=24, num_heads=4, num_kv_heads=2)
STEM = "base_model.model.model.layers.0"


@pytest.fixture
def directory(tmp_path):
    """Adapters of rank 2 on every matrix, as PEFT lays them out."""
    draw = np.random.default_rng(0).normal
    layers, experts = DECODER.num_layers, DECODER.num_experts
    into = {"wqkv": ((), (16,), (2, 4, 4)), "wo": ((), (2, 2, 4), (16,))}
    into |= {"w_in": ((experts,), (16,), (2, 24)), "w_out": ((experts,), (24,), (16,))}
    factors = {
        ("language", "layers", "attention" if name in ("wqkv", "wo") else "ffn", name): (
            draw(size=(layers, *stack, *inputs, 2)).astype(np.float32),
            draw(size=(layers, *stack, 2, *outputs)).astype(np.float32),
        )
        for name, (stack, inputs, outputs) in into.items()
    }
    peft.write(tmp_path / "adapters", DECODER, Adapters(1.5, factors), tmp_path / "base")
    return tmp_path / "adapters"


def rewrite(directory, change):
    """The directory with other tensors."""
    file = directory / "adapter_model.safetensors"
    tensors = change({name: np.array(tensor) for name, tensor in safetensors_files.read(file).tensors.items()})
    declared = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with safetensors_files.Writer(file, declared) as writer:
        for name, tensor in tensors.items():
            writer.write(name, [tensor])


def configure(directory, **settings):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_names_and_shapes(directory):
    """As peft 0.21 saves them with transformers 5 (tests/parity compares what they compute)."""
    shapes = {n: t.shape for n, t in safetensors_files.read(directory / "adapter_model.safetensors").tensors.items()}
    assert len(shapes) == DECODER.num_layers * 12
    assert shapes[f"{STEM}.self_attn.q_proj.lora_A.weight"] == (2, 16)
    assert shapes[f"{STEM}.self_attn.k_proj.lora_B.weight"] == (8, 2)
    assert shapes[f"{STEM}.mlp.experts.base_layer.lora_A.weight"] == (4 * 2, 16)
    assert shapes[f"{STEM}.mlp.experts.base_layer.lora_B.weight"] == (48, 4 * 2)
    assert shapes[f"{STEM}.mlp.experts.lora_A.weight"] == (4 * 2, 24)
    settings = json.loads((directory / "adapter_config.json").read_text())
    assert settings["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert (settings["r"], settings["lora_alpha"]) == (2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which is not supported; merge"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"r": "many"}, "r, lora_alpha and those of alpha_pattern must be above 0"),
        ({"alpha_pattern": {"q_proj": 0}}, "must be above 0"),
    ],
)
def test_settings_that_are_not_supported(directory, settings, message):
    configure(directory, **settings)
    with pytest.raises(UserError, match=message):
        peft.read(directory, DECODER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {f"{STEM}.mlp.gate.lora_A.weight": np.zeros((2, 16))}, "only attention and experts can have"),
        (lambda t: {n: x for n, x in t.items() if "q_proj.lora_B" not in n}, "does not fit the model: layer 0, q_proj"),
        (lambda t: t | {f"{STEM}.self_attn.o_proj.lora_A.weight": np.zeros((2, 8))}, "o_proj has factors of shapes"),
        (lambda t: t | {f"{STEM}.mlp.experts.lora_B.weight": np.zeros((16, 7))}, "are not of 4 experts"),
        (lambda t: {n.replace("layers.1", "layers.7"): x for n, x in t.items()}, "does not fit the model: layer 7"),
        (lambda t: {n: x * np.nan if "v_proj.lora_A" in n else x for n, x in t.items()}, "layer 0, v_proj holds NaNs"),
        (lambda t: {}, "holds no adapters"),
    ],
)
def test_tensors_of_another_model(directory, change, message):
    rewrite(directory, change)
    with pytest.raises(UserError, match=message):
        peft.read(directory, DECODER)


def test_base_that_is_not_here(directory, tmp_path):
    with pytest.raises(UserError, match="which is not a directory here: give the base"):
        checkpoints.open(directory)
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks adapter_model\.safetensors"):
        peft.read(directory, DECODER)
    with pytest.raises(UserError, match="holds no adapters: neither"):
        adapters.read_adapters(tmp_path, checkpoints.open(sphinx_jax.SHIPPED))
