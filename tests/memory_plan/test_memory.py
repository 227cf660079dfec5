"""What a step takes on this CPU, counted by the operating system, against what a plan of it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import ctypes, gc, json, mmap, sys, threading, time

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from sharding import MeshShape
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan import aot as compiling
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.memory_plan.training import training_batch, training_plan
from sphinx_jax.training.trainer import put, starting_params
from sphinx_jax.training.program import train_program
from sphinx_jax.training.train_config import Recipe
from sphinx_jax.training.train_state import init_state

compiling.has_gpu_compiler = lambda: False
CONFIG = SphinxConfig(DecoderConfig(128, 256, 4, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=512), None)
LENGTH, ROWS = 256, 64


def resident():
    # Without pages of files, such as the libraries', which come and go.
    with open("/proc/self/statm") as file:
        _, pages, of_files, *_ = map(int, file.read().split())
        return (pages - of_files) * mmap.PAGESIZE


def at_rest():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident()


def largest_while(work):
    found, done = [resident()], threading.Event()

    def look():
        while not done.is_set():
            found.append(resident())
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    work()
    done.set()
    thread.join()
    return max(found)


mesh = sharding.make_mesh()
recipes = [Recipe(steps=10, batch_size=ROWS, **said) for said in json.loads(sys.argv[1])]
shapes = training_batch(CONFIG, recipes[0], LENGTH)
random = np.random.default_rng(0)
batch = {name: random.integers(1, 512, dims, np.int32) for name, (dims, _) in shapes.items()}
plans = [training_plan("small", CONFIG, find_gpu("l4"), MeshShape(), recipe, shapes) for recipe in recipes]
for recipe, plan in zip(recipes, plans):
    program = train_program(CONFIG, recipe, mesh)
    step = jax.jit(program.step, donate_argnums=0)

    params = {n: starting_params(n, CONFIG, program, recipe, mesh, None) for n in program.state.params}
    kept = init_state(params, program.optimizer, mesh), put(batch, mesh)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    with sharding.mesh_context(mesh):
        # Once to load the programs and to start threads, whose memory stays.
        jax.block_until_ready(step(*copy(kept)))
        found = []
        for _ in range(3):
            rest = at_rest()
            args = jax.block_until_ready(copy(kept))
            found.append(largest_while(lambda: jax.block_until_ready(step(*args))) - rest)
            del args
    # What else the process does only adds to it.
    print(json.dumps({"planned": plan.per_device["total_bytes"] - plan.reserve, "measured": min(found)}))
"""

STEPS = [{}, {"remat": "block"}, {"grad_accum_steps": 4}]


@pytest.mark.slow
def test_remat_and_accumulation_change_memory_as_planned(tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-c", PROGRAM, json.dumps(STEPS)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    whole, *others = map(json.loads, done.stdout.splitlines())
    for step in (whole, *others):
        # What the program's threads work on is in no plan, nor what malloc keeps; and not all of a buffer may be used.
        assert abs(step["measured"] - step["planned"]) < whole["planned"] / 10
    for said, step in zip(STEPS[1:], others, strict=True):
        saved = whole["planned"] - step["planned"]
        assert saved > whole["planned"] / 2
        assert whole["measured"] - step["measured"] == pytest.approx(saved, rel=0.1), said
