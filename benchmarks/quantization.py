"""The cost of weight-only quantization: accuracy of the shipped nano on all held-out questions, bytes of the published
model, and error of the logits of the reference model in tests/golden against those of the original program; and the
speed of one sequence on this machine's CPU.

python benchmarks/quantization.py [speed]
"""

import dataclasses
import functools
import json
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jobs import Job, OurModel, time_after_idle
from PIL import Image

import sharding
import sphinx_jax
from sphinx_jax.config import DecoderConfig, preset
from sphinx_jax.data import easy_vqa
from sphinx_jax.kernels.moe import moe_ffn
from sphinx_jax.kernels.quantized import QuantizedDtype, quantize
from sphinx_jax.model import SphinxMoE
from sphinx_jax.quantization import abstract_quantized_params

KINDS: tuple[QuantizedDtype | None, ...] = (None, "int8", "int4")
ROUNDS = 5
"""Of timing, all kinds in turn; figures are medians."""

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def main() -> None:
    if sys.argv[1:] == ["speed"]:
        return print_speed()
    mesh = sharding.make_mesh()
    print("| weights | nano, overall | nano, open | nano, relative error of logits | sphinx-moe, GiB | of bfloat16 |")
    print("| --- | --- | --- | --- | --- | --- |")
    exact, unquantized_bytes = None, param_bytes("sphinx-moe", None, mesh)
    for kind in KINDS:
        model = sphinx_jax.load(sphinx_jax.SHIPPED, mesh, "float32", max_model_len=256, quantize=kind)
        overall, open_questions = accuracy(model)
        tokens = np.random.default_rng(0).integers(3, 400, (8, 32)).astype(np.int32)
        logits = np.asarray(model.logits(tokens))
        exact = logits if exact is None else exact
        error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
        size = param_bytes("sphinx-moe", kind, mesh)
        print(
            f"| {kind or 'unquantized'} | {overall:.2%} | {open_questions:.2%} | {error:.1e} | {size / 2**30:.1f} | "
            f"{size / unquantized_bytes:.3f} |",
            flush=True,
        )
    print()
    print("| reference model | mean error of logits | largest | relative | same top-1 token |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = reference_checkpoint(Path(folder))
        cases: list[tuple[str, QuantizedDtype | None]] = [("bfloat16", None), ("float32", "int8"), ("float32", "int4")]
        for dtype, kind in cases:
            model = sphinx_jax.load(checkpoint, mesh, dtype, quantize=kind)
            mean, largest, relative, same = reference_errors(model)
            print(f"| {kind or dtype} | {mean:.3f} | {largest:.2f} | {relative:.1e} | {same:.1%} |", flush=True)


def print_speed() -> None:
    """Decode of mixtral-140m against float32, and the chosen experts of one layer of SPHINX-MoE against bfloat16."""
    jobs = {kind: decode_job(kind) for kind in KINDS}
    tokens = jobs[None].tokens
    print("| mixtral-140m, decode of one sequence | tokens/s | of float32 |")
    print("| --- | --- | --- |")
    seconds = alternate({kind: jobs[kind].run for kind in KINDS})
    for kind in KINDS:
        print(f"| {kind or 'float32'} | {tokens / seconds[kind]:.0f} | {seconds[None] / seconds[kind]:.2f} |")
    print()
    print("| two experts of SPHINX-MoE, one token | ms | speed, of bfloat16 |")
    print("| --- | --- | --- |")
    seconds = alternate({kind: experts_run(kind) for kind in KINDS})
    for kind in KINDS:
        print(f"| {kind or 'bfloat16'} | {1000 * seconds[kind]:.1f} | {seconds[None] / seconds[kind]:.2f} |")


def alternate(runs: dict[QuantizedDtype | None, Callable[[], object]]) -> dict[QuantizedDtype | None, float]:
    """Median seconds of each, run in turn after a warm-up."""
    for run in runs.values():
        run()
    times = [{kind: time_after_idle(run) for kind, run in runs.items()} for _ in range(ROUNDS)]
    return {kind: statistics.median(each[kind] for each in times) for kind in runs}


def decode_job(kind: QuantizedDtype | None) -> Job:
    """Decode steps of mixtral-140m with synthetic parameters."""
    model = OurModel(dataclasses.replace(preset("mixtral-140m"), vision=None), "float32")
    if kind:
        model.quantize(kind)
    return model.decode(1)


def experts_run(kind: QuantizedDtype | None) -> Callable[[], object]:
    """One token's two experts of one layer, at the full model's width."""
    config = DecoderConfig()
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (1, config.dim), (2, config.dim, 2, config.hidden_dim), (2, config.hidden_dim, config.dim)
    x, w_in, w_out = (jax.random.normal(key, shape, jnp.bfloat16) / 64 for key, shape in zip(keys, shapes, strict=True))
    if kind:
        w_in, w_out = (jax.jit(quantize, static_argnums=(1, 2))(w, kind, axis) for w, axis in ((w_in, -3), (w_out, -2)))
    experts, weights = jnp.array([[1, 0]], jnp.int32), jnp.full((1, 2), 0.5, jnp.bfloat16)
    function = jax.jit(functools.partial(moe_ffn, implementation="gather"))
    return lambda: jax.block_until_ready(function(x, experts, weights, w_in, w_out))


def reference_checkpoint(folder: Path) -> Path:
    """SPHINX-MoE at small size with random weights, saved by the original program."""
    with tarfile.open(GOLDEN / "checkpoints.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    config_files = [GOLDEN / "ens" / f"{name}.json" for name in ("config", "meta", "vision")]
    for file in (*config_files, GOLDEN / "tokenizer" / "tokenizer.model"):
        (folder / "mp1" / file.name).symlink_to(file)
    return folder / "mp1"


def reference_errors(model: sphinx_jax.Sphinx) -> tuple[float, float, float, float]:
    """Errors of the logits on two conversations with images, against the original's in float32.

    The mean and the largest absolute difference, the relative difference in norm, and the fraction of positions with
    the same most probable token.
    """
    pixels = np.asarray(Image.open(GOLDEN / "ens" / "image_padded_resized.png"))
    with np.load(GOLDEN / "ens" / "inputs.npz") as inputs, np.load(GOLDEN / "ens" / "expected.npz") as expected:
        exact, best = expected["train_logits_cols"], expected["train_logits_argmax"]
        logits = np.asarray(model.logits(inputs["examples"][:, : best.shape[1]], [pixels, pixels[:, ::-1]]))
    # The reference holds every 125th column of the logits.
    difference = logits[..., ::125] - exact
    relative = np.linalg.norm(difference) / np.linalg.norm(exact)
    errors = np.abs(difference)
    return float(errors.mean()), float(errors.max()), float(relative), float((logits.argmax(-1) == best).mean())


def accuracy(model: sphinx_jax.Sphinx) -> tuple[float, float]:
    """On all held-out questions, and on those whose answer is not yes or no."""
    questions = [(record.id, question) for record in easy_vqa.load("test") for question in record.questions]
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "questions.jsonl", Path(folder) / "answers.jsonl"
        lines = (
            {"id": i, "image": str(easy_vqa.image_file("test", number)), "prompt": question.text}
            for i, (number, question) in enumerate(questions)
        )
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        list(model.answer_file(source, out, max_new_tokens=8))
        answers = {line["id"]: line["answer"] for line in map(json.loads, out.read_text().splitlines())}
    correct = np.array([answers[i] == question.answer for i, (_, question) in enumerate(questions)])
    is_open = np.array([question.answer not in ("yes", "no") for _, question in questions])
    return float(correct.mean()), float(correct[is_open].mean())


def param_bytes(name: str, kind: QuantizedDtype | None, mesh: jax.sharding.Mesh) -> int:
    """Bytes of the parameters of a preset in bfloat16, quantized to `kind` if given."""
    _, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(preset(name), unstacked=True, rngs=rngs), mesh, dtype=jnp.bfloat16
    )
    return sharding.bytes_per_device(abstract_quantized_params(params, kind) if kind else params)


if __name__ == "__main__":
    main()
