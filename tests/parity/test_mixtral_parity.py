"""transformers' Mixtral with random weights against ours, loading its files and writing ours."""

import numpy as np
import pytest

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints.formats import mixtral
from tests.parity.logits import our_logits, reference_logits

torch = pytest.importorskip("torch", reason="the reference is transformers on torch: install the parity extra")
transformers = pytest.importorskip("transformers", reason="the reference: install the parity extra")


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rms_norm_eps=1e-5,
        initializer_range=0.2,
    )
    return transformers.MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 96, (2, 33))


@pytest.mark.parametrize("limit", ["1GB", "60KB"], ids=["one file", "several files"])
@pytest.mark.parametrize("shape", [{}, {"tensor": 2, "expert": 2, "fsdp": 2}], ids=["one device", "eight devices"])
def test_logits_of_transformers_files(reference, tokens, tmp_path, limit, shape):
    reference.save_pretrained(tmp_path, max_shard_size=limit)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or limit == "60KB"
    loaded = checkpoints.load(tmp_path, sharding.make_mesh(**shape), unstacked=False)
    expected, ours = reference_logits(reference, tokens), our_logits(loaded, tokens)
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 1e-5
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("shards", [1, 2])
def test_transformers_reads_what_we_write(reference, tokens, tmp_path, shards):
    reference.save_pretrained(tmp_path / "theirs")
    loaded = checkpoints.load(tmp_path / "theirs", sharding.make_mesh(expert=4))
    mixtral.save(tmp_path / "ours", loaded.config, loaded.params, shards=shards)
    reloaded, report = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert reloaded.config.rope_parameters["rope_theta"] == 1e4
    original = reference.state_dict()
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, original[name]), name
    np.testing.assert_array_equal(reference_logits(reloaded.eval(), tokens), reference_logits(reference, tokens))
