"""Our Mixtral beside transformers' on torch: same weights, dtype, threads and lengths, one run, as ratios.

python benchmarks/cpu.py [--quick] [--json FILE]

Needs the parity extra, and some minutes. Repetitions of both sides alternate; a ratio is transformers' median time
over ours, with the faster of its two forms of the experts, so above 1 we are faster. Prints a Markdown table, each
row as it is measured. On a machine with other work, `taskset -c 0` before it leaves less to chance.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.config import preset
from sphinx_jax.inference import steps
from sphinx_jax.inference.sampling import Sampling
from sphinx_jax.model import SphinxMoE, bind
from sphinx_jax.training.optimizer import adamw
from sphinx_jax.training.state import init_state
from sphinx_jax.training.step import make_loss, make_train_step

try:
    # timm's torchvision does not import beside a CPU torch, and transformers would try to; Mixtral needs none.
    sys.modules["torchvision"] = None
    import torch
    import transformers
except ImportError:
    sys.exit("error: this benchmark compares with transformers on torch; run pip install -e '.[parity]'")

REPETITIONS = 3
"""Of each side, in turn, after one of each to warm up."""

DECODED, CONTEXT = 32, 256
"""Tokens that a decoding repetition adds, and that stand in the cache before."""


class Ours:
    def __init__(self, config):
        self.config, self.mesh = config, sharding.make_mesh()
        self.graph, self.params = sharding.init_params(lambda r: SphinxMoE(config, rngs=r), 0, self.mesh)
        apart = lambda r: SphinxMoE(config, apart=True, rngs=r)
        self.apart_graph, shapes = sharding.abstract_params(apart, self.mesh)
        stacked = self.params["language"]["layers"]
        layers = {i: jax.tree.map(lambda x, i=i: x[i], stacked) for i in shapes["language"]["layers"]}
        self.apart = {"language": self.params["language"] | {"layers": layers}}
        self.vocab = config.language.vocab_size

    def logits(self, tokens):
        return jax.jit(lambda p, t: bind(self.graph, p)(t)[0])(self.params, tokens)

    def train(self, tokens):
        optimizer = adamw(lambda step: 1e-4, weight_decay=0.01)
        start = jax.tree.map(jnp.copy, {"model": self.params, "attributes": {}})
        update = make_train_step(make_loss(self.graph, self.config), optimizer, sharding.shardings_of(start))
        step, self.state = jax.jit(update, donate_argnums=0), init_state(start, optimizer, self.mesh)
        batch = {"tokens": tokens, "labels": tokens}

        def run():
            self.state, _ = step(self.state, batch)
            jax.block_until_ready(self.state)

        return run

    def prefill(self, tokens):
        rows, length = tokens.shape
        self.state = steps.make_state(self.config.language, rows, length, jnp.float32)
        each = lambda value, dtype=np.int32: np.full(rows, value, dtype)
        chunk = steps.Chunk(
            row=np.arange(rows, dtype=np.int32),
            tokens=tokens,
            length=each(length),
            start=each(0),
            limit=each(10**6),
            seeds=np.zeros((rows, 2), np.uint32),
            seen=np.zeros((rows, self.vocab), bool),
        )
        never = jnp.ones((2, self.vocab), jnp.int8)
        read = jax.jit(lambda *a: steps.prefill(self.apart_graph, self.vocab, True, *a), donate_argnums=1)

        def run():
            self.state = jax.block_until_ready(read(self.apart, self.state, chunk, None, Sampling().values(), never))

        return run

    def decode(self, rows):
        slots = CONTEXT + DECODED + 1
        self.state = steps.make_state(self.config.language, rows, slots, jnp.float32)
        never = jnp.ones((2, self.vocab), jnp.int8)
        write = jax.jit(lambda *a: steps.decode(self.apart_graph, self.vocab, *a), donate_argnums=1)
        each = lambda value, dtype=jnp.int32: jnp.full(rows, value, dtype)

        def run():
            counters = {"length": each(CONTEXT), "token": each(5), "count": each(0), "limit": each(10**6)}
            state = self.state._replace(done=each(False, bool), stop=each(1), **counters)
            self.state = write(self.apart, state, Sampling().values(), never, np.int32(DECODED), np.int32(0))
            jax.block_until_ready(self.state)
            assert int(self.state.count[0]) == DECODED

        return run


class Theirs:
    def __init__(self, directory):
        self.model = transformers.MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def logits(self, tokens):
        with torch.no_grad():
            return self.model(torch.from_numpy(tokens).long()).logits.numpy()

    def train(self, tokens):
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        ids = torch.from_numpy(tokens).long()

        def run():
            self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def prefill(self, tokens):
        ids = torch.from_numpy(tokens).long()

        @torch.no_grad()
        def run():
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1)

        return run

    def decode(self, rows):
        ids = torch.full((rows, CONTEXT), 5)

        @torch.no_grad()
        def run():
            past = self.past
            for _ in range(DECODED):
                self.model(input_ids=ids[:, :1], past_key_values=past, use_cache=True)
            past.crop(-DECODED)

        with torch.no_grad():
            self.past = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        return run


def compare(quick: bool) -> Iterator[dict]:
    config = preset("mixtral-140m")
    ours = Ours(config)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weights"
        checkpoints.save(path, config, ours.params, None, format="mixtral")
        theirs = Theirs(path)
    random = np.random.default_rng(0)
    draw = lambda *shape: random.integers(3, ours.vocab, shape).astype(np.int32)
    tokens = draw(2, 16)
    difference = np.abs(np.asarray(ours.logits(tokens)) - theirs.logits(tokens)).max()
    if difference > 1e-3:
        sys.exit(f"error: the two models differ by {difference:.1e} in their scores; nothing was timed")

    jobs = [("prefill 1 x 512", "prefill", draw(1, 512), 512), ("prefill 4 x 512", "prefill", draw(4, 512), 2048)]
    jobs += [(f"decode, batch {rows}", "decode", rows, rows * DECODED) for rows in (1, 16)]
    # Last: it changes the weights.
    jobs += [("training step 4 x 256", "train", draw(4, 256), 1024)]
    for label, kind, argument, count in jobs:
        own = getattr(ours, kind)(argument)
        theirs.model.train(kind == "train")
        first = {}
        for name in ("eager", "grouped_mm"):
            theirs.model.set_experts_implementation(name)
            other = getattr(theirs, kind)(argument)
            other()
            first[name] = clock(other)
        best = min(first, key=first.get)
        theirs.model.set_experts_implementation(best)
        other = getattr(theirs, kind)(argument)
        own(), other()
        times = [(clock(own), clock(other)) for _ in range(1 if quick else REPETITIONS)]
        mine, peer = (statistics.median(side) for side in zip(*times, strict=True))
        found = {"job": label, "ratio": peer / mine, "tokens": count, "ours_s": mine, "theirs_s": peer}
        yield found | {"their_experts": best}


def clock(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repetition: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    names = ("jax", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{time.strftime('%Y-%m-%d')}, {versions}, {torch.get_num_threads()} threads, float32, mixtral-140m\n")
    print("| job | ours, tokens/s | transformers, tokens/s | their experts | ratio |")
    print("| --- | --- | --- | --- | --- |")
    rows = []
    for row in compare(options.quick):
        rows.append(row)
        mine, peer = row["tokens"] / row["ours_s"], row["tokens"] / row["theirs_s"]
        print(f"| {row['job']} | {mine:,.0f} | {peer:,.0f} | {row['their_experts']} | {row['ratio']:.2f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
