"""Our Mixtral against llama.cpp's on a CPU: same weights, threads and lengths, in one process.

pip install -e '.[llama]' && python benchmarks/llamacpp.py [--json FILE]

llama.cpp is compiled for this machine when it is installed. Repetitions of both sides alternate; a ratio is llama.cpp's
median time over ours, so above 1 we are faster. float32 stands beside F32, int8 beside Q8_0 and int4 beside Q4_0; in
float32 the logits must agree before anything is timed.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from jobs import DECODE_STEPS, PROMPT_LEN, OurModel, machine, time_after_idle

from sphinx_jax import checkpoints
from sphinx_jax.cli.startup import keep_freed_memory, prepare_process
from sphinx_jax.config import DecoderConfig, SphinxConfig, preset
from sphinx_jax.kernels.quantized import QuantizedDtype

try:
    import gguf
    import llama_cpp
    from gguf import GGMLQuantizationType
    from safetensors.numpy import load_file
except ImportError:
    sys.exit("error: this benchmark compares with llama.cpp; run pip install -e '.[llama]'")

KINDS: dict[QuantizedDtype | None, GGMLQuantizationType] = {
    None: GGMLQuantizationType.F32,
    "int8": GGMLQuantizationType.Q8_0,
    "int4": GGMLQuantizationType.Q4_0,
}

REPETITIONS = 5
"""Of each side, alternating, after one warm-up run of each."""

PREFILL_LEN = 512


class LlamaModel:
    """llama.cpp with the weights of a file, for one sequence."""

    def __init__(self, path: Path, threads: int):
        self._model = llama_cpp.Llama(
            str(path),
            n_ctx=1024,
            n_batch=PREFILL_LEN,
            n_ubatch=PREFILL_LEN,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=False,
            verbose=False,
        )

    def logits(self) -> np.ndarray:
        """Of the last token evaluated; a view that the next evaluation overwrites."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._model.ctx, -1), (self._model.n_vocab(),))

    def prefill(self, tokens: np.ndarray) -> Callable[[], None]:
        ids = tokens.tolist()

        def run() -> None:
            self._model.reset()
            self._model.eval(ids)

        return run

    def decode(self) -> Callable[[], None]:
        """DECODE_STEPS tokens after PROMPT_LEN positions, each the most probable."""
        prompt = [5] * PROMPT_LEN
        self._model.reset()
        self._model.eval(prompt)

        def run() -> None:
            # What follows the prompt is evaluated anew.
            self._model.n_tokens = PROMPT_LEN
            token = 5
            for _ in range(DECODE_STEPS):
                self._model.eval([token])
                token = int(self.logits().argmax())

        return run


def write_gguf(path: Path, config: DecoderConfig, weights: dict[str, np.ndarray], kind: GGMLQuantizationType) -> None:
    """A GGUF file of a Mixtral with weights under the names of transformers.

    Matrices but the router's are rounded as llama.cpp's own program does for `kind`, the embedding's too.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(4096)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    # Nothing is tokenized.
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)
    for name, array in gguf_tensors(config, weights):
        rounded = kind if array.ndim > 1 and "gate_inp" not in name else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, rounded), raw_dtype=rounded)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(config: DecoderConfig, weights: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of llama.cpp: experts in one array, the two coordinates of a rotation next to each other."""

    def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
        return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)

    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    yield "output.weight", weights["lm_head.weight"]
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        yield f"blk.{i}.attn_norm.weight", weights[layer + "input_layernorm.weight"]
        yield f"blk.{i}.ffn_norm.weight", weights[layer + "post_attention_layernorm.weight"]
        attention = {kind: weights[f"{layer}self_attn.{kind}_proj.weight"] for kind in "qkvo"}
        yield f"blk.{i}.attn_q.weight", interleaved(attention["q"], config.num_heads)
        yield f"blk.{i}.attn_k.weight", interleaved(attention["k"], config.num_kv_heads)
        yield f"blk.{i}.attn_v.weight", attention["v"]
        yield f"blk.{i}.attn_output.weight", attention["o"]
        experts = layer + "block_sparse_moe."
        yield f"blk.{i}.ffn_gate_inp.weight", weights[experts + "gate.weight"]
        for ours, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            each = [weights[f"{experts}experts.{e}.{ours}.weight"] for e in range(config.num_experts)]
            yield f"blk.{i}.ffn_{theirs}_exps.weight", np.stack(each)


def our_model(config: SphinxConfig, kind: QuantizedDtype | None) -> OurModel:
    model = OurModel(config, "float32")
    if kind:
        model.quantize(kind)
    return model


def compare(threads: int) -> Iterator[dict]:
    """One row for each kind of weights and job."""
    config = dataclasses.replace(preset("mixtral-140m"), vision=None)
    tokens = np.random.default_rng(0).integers(3, config.language.vocab_size, (1, PREFILL_LEN)).astype(np.int32)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        checkpoints.save(folder / "weights", config, OurModel(config, "float32").params, None, format="mixtral")
        weights: dict[str, np.ndarray] = {}
        for file in (folder / "weights").glob("*.safetensors"):
            weights |= load_file(file)
        for kind, ggml_kind in KINDS.items():
            write_gguf(folder / "model.gguf", config.language, weights, ggml_kind)
            ours, theirs = our_model(config, kind), LlamaModel(folder / "model.gguf", threads)
            if kind is None:
                theirs.prefill(tokens[0, :16])()
                difference = np.abs(ours.logits(tokens[:, :16])[0, -1] - theirs.logits()).max()
                if difference > 1e-3:
                    sys.exit(f"error: the logits of the two models differ by {difference:.1e}; nothing was timed")
            jobs = (
                (f"prefill 1 x {PREFILL_LEN}", ours.prefill(tokens), partial(theirs.prefill, tokens[0])),
                ("decode, batch 1", ours.decode(1), theirs.decode),
            )
            for label, job, make_run in jobs:
                their_run = make_run()
                job.run()
                their_run()
                times = [(time_after_idle(job.run), time_after_idle(their_run)) for _ in range(REPETITIONS)]
                our_seconds, their_seconds = (statistics.median(side) for side in zip(*times, strict=True))
                yield {
                    "job": label,
                    "ours": kind or "float32",
                    "theirs": ggml_kind.name,
                    "ratio": their_seconds / our_seconds,
                    "our_tokens_per_second": job.tokens / our_seconds,
                    "their_tokens_per_second": job.tokens / their_seconds,
                }


def main() -> None:
    prepare_process()
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "llama-cpp-python"))
    print(f"{time.strftime('%Y-%m-%d')}, {versions}, {threads} threads, mixtral-140m")
    print(f"{machine()}; {llama_cpp.llama_print_system_info().decode().strip()}\n")
    print("| job | ours | tokens/s | llama.cpp | tokens/s | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = []
    for row in compare(threads):
        rows.append(row)
        ours, theirs = f"{row['our_tokens_per_second']:,.0f}", f"{row['their_tokens_per_second']:,.0f}"
        print(
            f"| {row['job']} | {row['ours']} | {ours} | {row['theirs']} | {theirs} | {row['ratio']:.2f} |", flush=True
        )
    if options.json:
        described = {"versions": versions, "machine": machine(), "rows": rows}
        options.json.write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main()
