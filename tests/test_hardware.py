"""GPUs by name and from files, and unsupported ones."""

import dataclasses
import json

import pytest

from sharding import LayoutError
from sphinx_jax.hardware import GPUS, find_gpu


def test_known_gpus():
    assert set(GPUS) >= {
        "a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200", "l40s", "a6000", "a10g", "l4", "rtx3090", "rtx4090",
        "rtx4080",
    }  # fmt: skip
    gigabytes = {"a100-40gb": 40, "h100-80gb": 80, "a6000": 48, "rtx3090": 24, "rtx4080": 16, "b200": 180}
    for name, size in gigabytes.items():
        assert find_gpu(name.upper()).memory_bytes / 2**30 == pytest.approx(size, rel=0.01)
    assert all(gpu.compute_capability >= (8, 0) for gpu in GPUS.values())


@pytest.mark.parametrize("name", ["v100", "T4"])
def test_gpus_without_bfloat16_raise(name):
    with pytest.raises(LayoutError, match="no bfloat16"):
        find_gpu(name)


def test_unknown_gpu_error_lists_known_gpus_and_the_file_format():
    with pytest.raises(LayoutError, match=r"unknown GPU 'h1000'.*rtx4090.*mine\.json.*bandwidth_gb_s"):
        find_gpu("h1000")


def test_gpu_from_a_file(tmp_path):
    fields = dataclasses.asdict(GPUS["rtx4090"]) | {"name": "mine", "memory_mib": 49152}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(fields))
    assert find_gpu(str(file)) == dataclasses.replace(GPUS["rtx4090"], name="mine", memory_mib=49152)
    file.write_text(json.dumps(fields | {"compute_capability": [7, 5]}))
    with pytest.raises(LayoutError, match="no bfloat16"):
        find_gpu(str(file))
    for broken in ("{", "[]", json.dumps({"name": "x"}), json.dumps(fields | {"memory_mib": 0})):
        file.write_text(broken)
        with pytest.raises(LayoutError, match=r"mine\.json does not describe a GPU"):
            find_gpu(str(file))
    with pytest.raises(LayoutError, match=r"none\.json does not describe a GPU"):
        find_gpu(str(tmp_path / "none.json"))


def test_target_description():
    """Facts from the CUDA programming guide that are not in the datasheet."""
    text = " ".join(find_gpu("h100-80gb").target_description().split())
    for fact in ("core_count: 132", "{ major: 9 minor: 0 }", "shared_memory_per_block_optin: 232448"):
        assert fact in text
