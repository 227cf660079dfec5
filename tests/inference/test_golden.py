"""What the original program answered, from its own checkpoints: with an image and without, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sharding
import sphinx_jax
from sphinx_jax.checkpoints.formats import accessory
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.language.kv_cache import make_cache
from sphinx_jax.model import bind
from tests.conftest import GOLDEN, mesh_name
from tests.vision.test_golden import golden_images

ALL_AXES = {"tensor": 2, "expert": 2, "fsdp": 2}
# The variants differ in their images alone, after which the meshes do the same.
SLOW = [("ens", ALL_AXES), ("ens5", {})]
# As users compile it; on meshes the numbers alone.
QUICK = pytest.param(("ens", {}), marks=pytest.mark.optimized)
CASES = [QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
ONE_DEVICE = [QUICK, pytest.param(("ens5", {}), marks=pytest.mark.slow)]
LONGEST = 31
"""Tokens of the longest answer stored: in a batch the original let shorter prompts run past the limit."""


class Run:
    """One variant on one mesh, from the files of two shards, and what the original answered."""

    def __init__(self, variant, shape, directory, golden):
        self.model = sphinx_jax.load(directory, sharding.make_mesh(**shape), "float32")
        self.expected, self.inputs = golden(f"{variant}/expected.npz"), golden(f"{variant}/inputs.npz")
        self.facts = golden(f"{variant}/expected.json")
        self.scenarios = {scenario["name"]: scenario for scenario in self.facts["generate"]}
        pixels = np.asarray(Image.open(GOLDEN / variant / "image_padded_resized.png"))
        self.pixels, self.image = [pixels, pixels[:, ::-1]], golden_images(variant)[:1]


def case_name(case) -> str:
    return f"{case[0]}-{mesh_name(case[1])}"


@pytest.fixture(scope="module", params=CASES, ids=case_name)
def run(request, golden_checkpoint, golden):
    variant, shape = request.param
    return Run(variant, shape, golden_checkpoint(variant, 2), golden)


def test_every_scenario_is_answered_as_by_the_original(run):
    """All prompts as one mixed batch: an answer does not depend on the rest of the batch."""
    prompts, images, expected, texts = [], [], [], []
    for name in ("image_single", "image_batch2_different_lengths", "text_only_batch3"):
        scenario = run.scenarios[name]
        prompts += scenario["prompts"]
        images += run.pixels[: scenario["n_images"]] or [None] * len(scenario["prompts"])
        expected += scenario["output_tokens"]
        texts += scenario["output"]
    answers = run.model.complete(prompts, images, raw=True, max_new_tokens=LONGEST)
    for answer, tokens, text in zip(answers, expected, texts, strict=True):
        assert answer.tokens[: len(tokens)] == tokens
        assert run.model.tokenizer.decode(answer.tokens[: len(tokens)]) == text


@pytest.mark.parametrize("run", ONE_DEVICE, ids=case_name, indirect=True)
def test_generate_and_stream_give_the_originals_text(run):
    (prompt,) = run.scenarios["image_single"]["prompts"]
    (stopping,) = (s for s in run.scenarios.values() if "additional_stop_symbols" in s["kwargs"])
    ask = {"raw": True, "max_new_tokens": 8}
    assert run.model.generate([prompt], run.pixels[:1], **ask) == run.scenarios["image_single"]["output"]
    assert "".join(run.model.stream(prompt, run.pixels[0], **ask)) == run.scenarios["image_single"]["output"][0]
    stop = stopping["kwargs"]["additional_stop_symbols"]
    # The original stops at tokens and so drops the space before the word with it.
    assert run.model.generate([prompt], run.pixels[:1], stop=stop, **ask)[0].rstrip() == stopping["output"][0]


def test_logits_of_cached_decoding(run):
    """The prompt prefilled, then eight decode steps: the logits after each."""
    engine, e = run.model.engine, run.expected
    prompt = jnp.asarray(run.inputs["prompt_tokens"], jnp.int32)
    cache_len = run.model.config.num_image_tokens + prompt.shape[1] + len(e["decode_tokens"])

    def forward(params, cache, tokens, start, image):
        model = bind(engine._programs.graph, params)
        x = model.embed(tokens, None if image is None else model.encode_images(image))
        positions = start + jnp.arange(x.shape[1])[None]
        hidden, cache, _ = model.language(x, positions, Causal(positions[:, 0]), cache)
        return model.language.logits(hidden[:, -1:])[0, 0], cache, start + x.shape[1]

    with sharding.mesh_context(run.model.mesh):
        forward = jax.jit(forward)
        cache = make_cache(run.model.config.language, 1, cache_len, jnp.float32)
        logits, cache, start = forward(engine.params, cache, prompt, jnp.int32(0), run.image)
        rows = [logits]
        for token in e["decode_tokens"]:
            logits, cache, start = forward(engine.params, cache, jnp.full((1, 1), token, jnp.int32), start, None)
            rows.append(logits)
        rows = np.asarray(jnp.stack(rows))
    assert start == cache_len
    np.testing.assert_array_equal(rows.argmax(-1), e["decode_logits_argmax"])
    np.testing.assert_array_equal(rows.argmax(-1)[:-1], e["decode_tokens"])
    np.testing.assert_allclose(rows[:, ::125], e["decode_logits_cols"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(rows[0], e["decode_logits_full_first"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(rows[-1], e["decode_logits_full_last"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(jax.nn.logsumexp(rows, axis=-1)), e["decode_logits_lse"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_is_no_further_from_float32_than_the_originals(golden_checkpoint, golden):
    """First logits and image embeddings, on average and at most: as far from the original's float32 as its own may be.

    The original's bfloat16 was computed on a CPU too. Logits are about 2.9 wide, words 1.
    """
    loaded = accessory.load(golden_checkpoint("ens", 1), sharding.make_mesh(), "bfloat16")
    run = jax.jit(lambda params, tokens, images: bind(loaded.graph, params)(tokens, images))
    prompt = golden("ens/inputs.npz")["prompt_tokens"].astype(np.int32)
    logits, intermediates = run(loaded.params, prompt, golden_images("ens")[:1])
    exact, theirs = golden("ens/expected.npz"), golden("ens/info_bf16_cpu.npz")
    first = np.asarray(logits)[0, -1]
    assert first.argmax() == exact["decode_logits_argmax"][0]
    for ours, reference, wide in (
        (first[::125], theirs["first_logits_cols"], exact["decode_logits_cols"][0]),
        (intermediates["image_embeds"][0], theirs["encode_image"], exact["encode_image"][:1]),
    ):
        ours_off = np.abs(np.asarray(ours, np.float32) - wide)
        reference_off = np.abs(reference.astype(np.float32) - wide)
        assert ours_off.mean() <= reference_off.mean()
        assert ours_off.max() <= reference_off.max()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mean", "relative", "same"), [("int8", 0.05, 0.02, 0.92), ("int4", 0.8, 0.36, 0.45)])
def test_what_quantization_costs_in_logits(kind, mean, relative, same, golden_checkpoint, golden):
    """Against the original's float32 on two whole conversations; figures in docs/quantization-and-offload.md."""
    model = sphinx_jax.load(golden_checkpoint("ens", 1), sharding.make_mesh(), "float32", quantize=kind)
    exact, tokens = golden("ens/expected.npz"), golden("ens/inputs.npz")["examples"]
    best = exact["train_logits_argmax"]
    logits = np.asarray(model.logits(tokens[:, : best.shape[1]], golden_images("ens")))
    off = logits[..., ::125] - exact["train_logits_cols"]
    # Rounding shows, or nothing was rounded.
    assert 0.01 < np.abs(off).mean() <= mean
    assert np.linalg.norm(off) <= relative * np.linalg.norm(exact["train_logits_cols"])
    assert (logits.argmax(-1) == best).mean() >= same
