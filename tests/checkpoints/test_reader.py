"""Copies between memory orders and dtypes, and host memory while loading."""

import itertools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sphinx_jax.checkpoints.io.copying import aligned_empty, copy, has_nan
from sphinx_jax.checkpoints.io.mapped_file import MappedFile

ROOT = Path(__file__).parents[2]
BFLOAT16, FLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype("float16"), np.dtype("float32")


@pytest.mark.parametrize(
    ("stored", "expected_dtype"),
    [
        (BFLOAT16, BFLOAT16),
        (BFLOAT16, FLOAT32),
        (FLOAT32, BFLOAT16),
        (FLOAT32, FLOAT32),
        (FLOAT16, FLOAT32),
        (np.dtype("float64"), FLOAT32),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(3, 300, 701), (7, 130, 131, 1), (257, 513), (2, 3, 40, 300), (5,), ()], ids=str)
def test_copy_in_every_order(shape, stored, expected_dtype):
    original = np.random.default_rng(0).standard_normal(shape).astype(stored)
    with ThreadPoolExecutor(2) as pool:
        for order in itertools.permutations(range(len(shape))):
            source = original.transpose(order)
            # A slice of a larger array, as the gate is of gate and up.
            outer = np.zeros((2, *source.shape, 2), expected_dtype)
            progress = []
            copy(outer[1, ..., 1], source, pool, progress.append)
            np.testing.assert_array_equal(outer[1, ..., 1], source.astype(expected_dtype))
            assert not outer[0].any() and not outer[..., 0].any()
            assert sum(progress) == source.size


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
def test_nans_are_found_anywhere_and_infinities_are_not_nans(dtype):
    array = np.zeros((1000, 1001), dtype)
    array[3, 4], array[500, 0] = np.inf, -np.inf
    assert not has_nan(array)
    for place in ((0, 0), (500, 500), (999, 1000)):
        for nan in (np.nan, -np.nan):
            with_nan = array.copy()
            with_nan[place] = nan
            assert has_nan(with_nan)


def test_arrays_are_aligned_for_xla():
    for size in (1, 1000, 1 << 20):
        assert aligned_empty((size,), BFLOAT16).ctypes.data % 64 == 0


def test_views_of_a_mapped_file_stay_inside(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.arange(10, dtype=np.int32).tobytes())
    file = MappedFile(path)
    assert file.view(8, np.dtype("int32"), (2, 2), (1, 3)).tolist() == [[2, 5], [3, 6]]
    assert file.view(0, np.dtype("int32"), (0, 7), (7, 1)).shape == (0, 7)
    outside = [(8, (9,), (1,)), (-4, (2,), (1,)), (0, (2, 2), (9, 1)), (4, (2,), (-1,)), (0, (-1,), (1,))]
    for offset, shape, strides in outside:
        with pytest.raises(ValueError, match="past the end"):
            file.view(offset, np.dtype("int32"), shape, strides)


@pytest.mark.parametrize("options", [[], ["--stacked", "--dtype", "float32"]], ids=["unstacked", "stacked float32"])
def test_host_memory_stays_within_the_largest_parameter(options):
    """The benchmark, small: host memory besides the arrays is bounded by the largest parameter."""
    size = ["--gigabytes", "0.3", "--layers", "1", "--width", "1024", "--vocab", "2000", "--shards", "2"]
    program = [sys.executable, str(ROOT / "benchmarks" / "loading.py"), *size, "--repeats", "1", *options]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    times = float(re.search(r"peak, ([\d.]+) of the largest parameter", done.stdout)[1])
    assert 0 < times < 1.3, done.stdout
