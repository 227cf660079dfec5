"""How many sequences fit: numbers worked out by hand, and a run with as many as a small memory holds."""

import pytest

import sharding
from sphinx_jax.config import preset
from sphinx_jax.errors import UserError
from sphinx_jax.inference import capacity, generate, warmup
from sphinx_jax.inference.bucketing import FILE_CHUNKS
from sphinx_jax.inference.capacity import max_num_seqs
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.sampling import SamplingParams

GIB = 2**30


def sphinx_moe_1k(number: int) -> int:
    """4,096 positions of 32 layers x 8 heads x 128 x 2 x 2 bytes = 512 MiB, and up to 64 prefixes of 2,048."""
    return number * 512 * 2**20 + min(number, 64) * 256 * 2**20


@pytest.mark.parametrize(
    ("free", "groups", "expected"),
    [
        # 143,771 MiB - 87 GiB of parameters = 53.4 GiB, at 0.75 GiB a sequence: 71.2, so 64 for 48 GiB; 72 take 52.
        (53.4 * GIB, 1, 72),
        (52 * GIB, 1, 72),
        (52 * GIB - 1, 1, 64),
        (6 * GIB, 1, 8),
        (6 * GIB - 1, 1, 4),
        (0.75 * GIB, 1, 1),
        (1000 * GIB, 1, 256),
        # Two groups: as many for each.
        (12 * GIB, 2, 16),
        (11 * GIB, 2, 8),
    ],
)
def test_by_hand(free, groups, expected):
    assert max_num_seqs(int(free), sphinx_moe_1k, groups, 256) == expected


def test_none_fits():
    with pytest.raises(UserError, match=r"needs 0\.75 GiB on each device and 0\.70 GiB are free"):
        max_num_seqs(int(0.7 * GIB), sphinx_moe_1k, 1, 256)


def test_the_most_of_a_small_number_of_groups():
    assert max_num_seqs(GIB, lambda number: number, 8, 4) == 8


@pytest.fixture
def device(monkeypatch):
    """device(engine, bytes_limit, bytes_in_use): its only device is a GPU with so much memory."""

    class Gpu:
        platform = "gpu"

        def __init__(self, limit: int, in_use: int):
            self.memory_stats = lambda: {"bytes_limit": limit, "bytes_in_use": in_use}

    class OneDevice:
        def __init__(self, limit: int, in_use: int):
            self.local_devices = [Gpu(limit, in_use)]

    return lambda engine, limit, in_use: monkeypatch.setattr(engine, "mesh", OneDevice(limit, in_use))


def test_what_parameters_and_temporaries_leave(model, device, monkeypatch):
    engine = model.engine
    monkeypatch.setattr(capacity, "IMAGE_CACHE_BYTES", 1000)
    compiled = []
    monkeypatch.setattr(warmup, "working_bytes", lambda engine, shape, chunks: compiled.append(shape) or 5000)

    def shape_of(number):
        return StateShape(number, 128)

    one = engine.state_bytes(shape_of(1))
    # 95 % of what is free, 1,000 for images and 5,000 for temporaries: 24 sequences to the byte, and one byte less.
    need = 24 * one + 6000
    for missing, expected in ((0, 24), (100, 16)):
        device(engine, int((need - missing) / 0.95) + 1 + 12345, 12345)
        assert capacity.num_seqs(engine, "auto", shape_of, FILE_CHUNKS) == expected
    assert compiled[0].num_seqs == 24
    assert capacity.num_seqs(engine, 7, shape_of, FILE_CHUNKS) == 7


def test_a_quarter_of_the_hosts_memory(model, monkeypatch):
    engine, pages = model.engine, {"SC_PAGE_SIZE": 4096}
    one = engine.state_bytes(StateShape(1, 128))
    monkeypatch.setattr(capacity.os, "sysconf", lambda name: pages[name])
    devices = len(engine.mesh.local_devices)
    for number, expected in ((16, 16), (12, 8), (1000, 64)):
        pages["SC_PHYS_PAGES"] = 4 * devices * number * one // 4096 + devices
        assert capacity.num_seqs(engine, "auto", lambda n: StateShape(n, 128), FILE_CHUNKS) == expected


@pytest.mark.slow
def test_working_bytes_are_the_largest_programs(model):
    """Compiled and not run: at least the logits of a chunk and what a chunk of the most tokens computes between."""
    shape = StateShape(4, 512, 4, 64)
    before = model.engine.compilations
    found = warmup.working_bytes(model.engine, shape, FILE_CHUNKS)
    # The state; encoders, of one image and of most; a prompt's first chunk, with an image and without, and a later one;
    # and decode steps.
    assert model.engine.compilations - before <= 7
    tokens, dim = 4 * 512, model.config.language.dim
    assert tokens * dim * 4 < found < 2**30


@pytest.mark.slow
def test_auto_answers_as_a_number_does(model, images):
    requests = [model.request("is there a circle?", image, SamplingParams(max_new_tokens=3)) for image in images] * 3
    auto, four = (generate.run_all(model.engine, requests, number) for number in ("auto", 4))
    assert [completion.tokens for completion in auto] == [completion.tokens for completion in four]


def test_a_cache_that_no_device_holds_is_refused_before_anything_is_read(monkeypatch):
    """Two of key and value, bytes by hand: layers x positions x heads x head dimension x 4 bytes."""
    config, mesh = preset("nano").language, sharding.make_mesh()
    per_position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    # What the state holds besides is small beside a cache of a million positions.
    needed = per_position * 4 * 1_000_000
    monkeypatch.setattr(capacity, "_host_bytes", lambda: int(needed * 1.01) * len(mesh.local_devices))
    capacity.check_cache_fits(config, mesh, "float32", 4, 1_000_000)
    monkeypatch.setattr(capacity, "_host_bytes", lambda: int(needed * 0.99) * len(mesh.local_devices))
    with pytest.raises(UserError, match="use a shorter --max-model-len or a smaller --max-num-seqs"):
        capacity.check_cache_fits(config, mesh, "float32", 4, 1_000_000)
