"""Adapters of the library peft on transformers' Mixtral against ours, in both directions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints import adapters, lora
from sphinx_jax.checkpoints.formats import peft as peft_format
from sphinx_jax.checkpoints.loaded_model import abstract_adapters
from sphinx_jax.cli import common, convert
from sphinx_jax.config import LoraConfig
from tests.parity.logits import our_logits, reference_logits

torch = pytest.importorskip("torch", reason="the reference is peft on torch: install the parity extra")
transformers = pytest.importorskip("transformers", reason="the reference: install the parity extra")
peft = pytest.importorskip("peft", reason="the reference: install the parity extra")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
ATTENTION, EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 96, (2, 17))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with a random Mixtral of transformers."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).save_pretrained(path)
    return path


def with_peft(base, directory):
    return peft.PeftModel.from_pretrained(transformers.MixtralForCausalLM.from_pretrained(base), directory).eval()


def save_random(base, directory, **settings):
    """A directory that peft wrote, with random factors."""
    model = transformers.MixtralForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | settings
    )
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


def merged_logits(base, directory, tokens):
    source = adapters.with_adapters(checkpoints.open(base), directory)
    return our_logits(checkpoints.load(source, sharding.make_mesh(), unstacked=False), tokens)


def assert_equal(ours, expected, plain):
    """Within 1e-5 of the largest logit, and not because the adapters change nothing."""
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(expected - plain).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": EXPERTS},
        {"target_parameters": EXPERTS[::-1]},
        {"target_parameters": EXPERTS[1:], "target_modules": ["q_proj", "v_proj"]},
        {"rank_pattern": {"k_proj": 5}, "alpha_pattern": {"layers.1.self_attn.o_proj": 11}, "use_rslora": True},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]},
    ],
    ids=["attention and experts", "experts in the other order", "some matrices", "patterns", "one layer"],
)
def test_logits_of_what_peft_saved(base, tokens, tmp_path, settings):
    save_random(base, tmp_path / "adapters", **settings)
    plain = reference_logits(transformers.MixtralForCausalLM.from_pretrained(base).eval(), tokens)
    expected = reference_logits(with_peft(base, tmp_path / "adapters"), tokens)
    assert_equal(merged_logits(base, tmp_path / "adapters", tokens), expected, plain)


def test_directory_of_peft_opens_with_its_base(base, tokens, tmp_path):
    """adapter_config.json names the base."""
    save_random(base, tmp_path, target_parameters=EXPERTS)
    loaded = checkpoints.load(tmp_path, sharding.make_mesh(), unstacked=False)
    np.testing.assert_array_equal(our_logits(loaded, tokens), merged_logits(base, tmp_path, tokens))


def test_experts_as_modules_of_their_own(base, tokens, tmp_path):
    """As peft saved them with transformers 4; peft converts such a directory when it reads it."""
    directory = save_random(base, tmp_path, target_modules=[*ATTENTION])
    file = directory / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors, generator = load_file(file), torch.Generator().manual_seed(2)
    for layer in range(2):
        for expert in range(4):
            for matrix, into, out_of in (("w1", 32, 24), ("w2", 24, 32), ("w3", 32, 24)):
                stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}"
                tensors[f"{stem}.lora_A.weight"] = 0.3 * torch.randn(3, into, generator=generator)
                tensors[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(out_of, 3, generator=generator)
    save_file(tensors, file)
    settings = json.loads((directory / "adapter_config.json").read_text())
    settings["target_modules"] = [*ATTENTION, "w1", "w2", "w3"]
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    plain = reference_logits(transformers.MixtralForCausalLM.from_pretrained(base).eval(), tokens)
    expected = reference_logits(with_peft(base, directory), tokens)
    assert_equal(merged_logits(base, directory, tokens), expected, plain)


@pytest.fixture
def run(base, tmp_path):
    """Writes a LoRA run's directory with random adapters."""

    def write(targets):
        source, config = checkpoints.open(base), LoraConfig(rank=3, alpha=4.5, target_modules=targets)
        draw = np.random.default_rng(3).normal
        tree = jax.tree.map(
            lambda leaf: jnp.asarray(0.3 * draw(size=leaf.shape), jnp.float32), abstract_adapters(source.config, config)
        )
        path = tmp_path / f"run-{targets}"
        path.mkdir()
        lora.write_adapter_info(path, source, config)
        lora.save(path, tree)
        return path

    return write


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_peft_reads_what_we_write(base, run, tokens, tmp_path, targets, capsys):
    out = tmp_path / "out"
    assert common.run(convert.main, [str(run(targets)), str(out), "--format", "peft"]) == 0
    assert str(base) in capsys.readouterr().out
    plain = reference_logits(transformers.MixtralForCausalLM.from_pretrained(base).eval(), tokens)
    ours = our_logits(checkpoints.load(tmp_path / f"run-{targets}", sharding.make_mesh(), unstacked=False), tokens)
    assert_equal(ours, reference_logits(with_peft(base, out), tokens), plain)
    # And back, exactly: the factors that queries, keys and values share are found to be the same.
    written, read = (
        lora.read_run(tmp_path / f"run-{targets}", checkpoints.open(base).config),
        peft_format.read(out, checkpoints.open(base).config.language),
    )
    assert written.scale == read.scale and written.factors.keys() == read.factors.keys()
    jax.tree.map(np.testing.assert_array_equal, dict(written.factors), dict(read.factors))


def test_bfloat16_and_refusals(base, run, tmp_path, capsys):
    path = run("attention")
    assert (
        common.run(convert.main, [*map(str, (path, tmp_path / "half")), "--format", "peft", "--dtype", "bfloat16"]) == 0
    )
    assert {p.dtype for n, p in with_peft(base, tmp_path / "half").named_parameters() if "lora_" in n}
    for arguments, message in (
        ([base, tmp_path / "no"], f"{base} holds no adapters"),
        ([path, tmp_path / "no", "--shards", "2"], "do not go with --format peft"),
        ([path, tmp_path / "half"], "exists already"),
        ([path, tmp_path / "no", "--step", "3"], "has no checkpoints"),
    ):
        assert common.run(convert.main, [*map(str, arguments), "--format", "peft"]) == 2
        assert message in capsys.readouterr().err
