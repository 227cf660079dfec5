"""Eight simulated CPU devices and exact float32 products for every test but those that need a GPU."""

import gc
import importlib.metadata
import json
import os
import tarfile
import tempfile
from pathlib import Path

# pytest's option --jaxtyping-packages names it.
import tests.type_checker  # noqa: F401
from sphinx_jax.cli.startup import prepare_process

# .ci/run has the workers allocate with jemalloc. Programs that tests start allocate as their users' do.
if "PYTEST_XDIST_WORKER" in os.environ and "jemalloc" in os.environ.get("LD_PRELOAD", ""):
    del os.environ["LD_PRELOAD"]

# The newer of XLA's two ways to emit fusions takes twice the time. Later versions have no other, and end a process that
# sets an option which they do not know. Programs that tests start inherit it.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Before jax: its CUDA plugin logs to every worker's standard error that there is no driver.
prepare_process()

# With a setting, here glibc's default, commands called in this process do not have its malloc keep what is freed.
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(128 * 1024))

# Compilation dominates the time of these tests, and several compile the same program: pytest's workers, which inherit
# these variables, and the programs that tests start, as well.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compilation_cache = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compilation_cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import sharding  # noqa: E402


def pytest_configure(config):
    if config.getoption("markexpr") != "gpu":
        sharding.simulate_devices(8)


jax.config.update("jax_default_matmul_precision", "highest")

# What is imported stays, and tracing makes many objects that live on: looking for garbage among them took 4 %.
gc.freeze()
gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Programs are compiled in half the time, or for tests marked `optimized` as users do; also those in processes."""
    optimized = any(item.get_closest_marker(name) for name in ("optimized", "gpu"))
    jax.config.update("jax_disable_most_optimizations", not optimized)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(not optimized))


@pytest.fixture(scope="module", autouse=True)
def free_memory():
    """What a file's tests made goes before the next file's begin.

    Programs that jax keeps hold memory mappings; of all tests, more than the 65,530 that Linux gives a process.
    """
    yield
    jax.clear_caches()
    gc.collect()


GOLDEN = Path(__file__).parent / "golden"

MESHES = [
    {},
    {"tensor": 2},
    {"expert": 4},
    {"tensor": 2, "expert": 2, "fsdp": 2},
    {"data": 2, "tensor": 4},
]
"""One device, and meshes that cover every mesh axis: results must agree on all of them."""


def mesh_name(shape: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in shape.items()) or "one"


@pytest.fixture(params=MESHES, ids=mesh_name)
def mesh(request):
    return sharding.make_mesh(**request.param)


@pytest.fixture(scope="session")
def golden():
    """A reader of the original program's reference data: `.npz` as a dict of arrays, `.json` parsed."""

    def read(name: str):
        path = GOLDEN / name
        if path.suffix == ".json":
            return json.loads(path.read_text())
        with np.load(path) as arrays:
            return dict(arrays)

    return read


@pytest.fixture(scope="session")
def attention_reference():
    """q [B, L, K, G, D], k and v [B, S, K, D], gradient of the output, mask [B or 1, L, S] -> the output, and the
    gradients of q, k and v.

    float64, from the definition.
    """

    def reference(*args):
        *arrays, mask = args
        # [B, K, G, L, D]
        q, k, v, d_out = (np.moveaxis(np.asarray(x, np.float64), 1, -2) for x in arrays)
        k, v, scale = k[:, :, None], v[:, :, None], q.shape[-1] ** -0.5
        scores = q @ k.swapaxes(-1, -2) * scale
        scores = np.where(np.asarray(mask)[:, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        d_weights = d_out @ v.swapaxes(-1, -2)
        d_scores = weights * (d_weights - np.sum(weights * d_weights, axis=-1, keepdims=True)) * scale
        d_k, d_v = ((d.swapaxes(-1, -2) @ x).sum(axis=2) for d, x in ((d_scores, q), (weights, d_out)))
        return tuple(np.moveaxis(x, -2, 1) for x in (weights @ v, d_scores @ k, d_k, d_v))

    return reference


@pytest.fixture(scope="session")
def causal_attention(attention_reference):
    """`attention_reference` with a causal mask."""
    return lambda q, *others: attention_reference(q, *others, np.tril(np.ones((1, q.shape[1], q.shape[1]), bool)))


@pytest.fixture(scope="session")
def moe_reference():
    """x, experts, weights, w_in, w_out, and dy or not -> y, and the gradients of sum(y dy) for all but the experts.

    float64, expert by expert from the definition.
    """

    def reference(x, experts, weights, w_in, w_out, dy=None):
        num_experts, experts = len(w_in), np.asarray(experts)
        x, weights = (np.asarray(a, np.float64) for a in (x, weights))
        y, dx, dweights = (np.zeros_like(a) for a in (x, x, weights))
        dw_in, dw_out = [], []
        for e in range(num_experts):
            w_gate_up, w_down = (np.asarray(w[e], np.float64) for w in (w_in, w_out))
            t, j = np.nonzero(experts == e)
            gate, up = x[t] @ w_gate_up[:, 0], x[t] @ w_gate_up[:, 1]
            sigmoid = 1 / (1 + np.exp(-gate))
            hidden, weight = gate * sigmoid * up, weights[t, j, None]
            np.add.at(y, t, weight * (hidden @ w_down))
            if dy is None:
                continue
            d_out = np.asarray(dy, np.float64)[t]
            dweights[t, j] = np.sum(hidden @ w_down * d_out, axis=1)
            d_hidden = weight * (d_out @ w_down.T)
            d_gate, d_up = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid)), d_hidden * gate * sigmoid
            np.add.at(dx, t, d_gate @ w_gate_up[:, 0].T + d_up @ w_gate_up[:, 1].T)
            dw_in.append(np.stack([x[t].T @ d_gate, x[t].T @ d_up], axis=1))
            dw_out.append(hidden.T @ (weight * d_out))
        return y if dy is None else (y, (dx, dweights, np.stack(dw_in), np.stack(dw_out)))

    return reference


@pytest.fixture(scope="session")
def chunk_attention(causal_attention):
    """start [B], q [B, S, K, G, D], k and v [B, cache_len, K, D] -> the output, with query i at position start + i.

    Computed as causal attention of full sequences, with zeros for the queries before `start`.
    """

    def one_sequence(start, q, k, v):
        full_q = np.concatenate([np.zeros((start, *q.shape[1:])), q])[None]
        k, v = (x[None, : full_q.shape[1]] for x in (k, v))
        return causal_attention(full_q, k, v, full_q)[0][0, start:]

    return lambda *args: np.stack([one_sequence(*sequence) for sequence in zip(*map(np.asarray, args), strict=True)])


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory):
    """(variant, shards) -> the directory of a checkpoint of the original program: `ens` or `ens5`, 1 or 2 shards.

    Both variants have the same weights, which are stored once.
    """
    unpacked = tmp_path_factory.mktemp("weights")
    with tarfile.open(GOLDEN / "checkpoints.tar.xz") as archive:
        archive.extractall(unpacked, filter="data")

    def path(variant: str, shards: int) -> Path:
        directory = tmp_path_factory.getbasetemp() / f"{variant}-mp{shards}"
        if not directory.exists():
            directory.mkdir()
            metadata = [GOLDEN / variant / f"{name}.json" for name in ("config", "meta", "vision")]
            weights = (unpacked / f"mp{shards}").iterdir()
            for file in (*weights, *metadata, GOLDEN / "tokenizer" / "tokenizer.model"):
                (directory / file.name).symlink_to(file)
        return directory

    return path
