"""GPU facts from datasheets, and the compiler's target description derived from them."""

import dataclasses
import json
from pathlib import Path
from typing import NoReturn

from sharding.errors import LayoutError
from sphinx_jax import allocator

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU model. Rates are the datasheet's, without sparsity."""

    name: str
    memory_mib: int
    """Total memory as the driver reports it, in MiB."""
    bandwidth_gb_s: float
    """Memory bandwidth in 1e9 bytes per second."""
    bf16_tflops: float
    """Dense bfloat16 matrix products with float32 accumulation, in 1e12 operations per second."""
    compute_capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    l2_mib: int
    nvlink_gb_s: float = 0.0
    """What a GPU sends to others of its host over NVLink, in 1e9 bytes per second: half of the datasheet's figure, of
    both directions. 0: there is only PCIe."""

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * 2**20

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth in bytes per second."""
        return self.bandwidth_gb_s * 1e9

    @property
    def bf16_flops(self) -> float:
        """Dense bfloat16 operations per second."""
        return self.bf16_tflops * 1e12

    @property
    def pool_bytes(self) -> int:
        """What XLA can allocate: the capacity of plans."""
        return allocator.pool_bytes(self.memory_bytes)

    @property
    def host_bandwidth(self) -> float:
        """Bytes per second of copies from pinned host memory: 16 lanes of PCIe 5 from Hopper on, of PCIe 4 before.

        As measured by nvbandwidth (host_to_device_memcpy_ce), of theoretical 63.0 and 31.5 GB/s: 55.6 on an H100
        (NVIDIA's post on nvbandwidth), 23.9 to 26.4 on eight RTX 4090 (NVIDIA/nvbandwidth issue 15), 24.8 on A100s
        (issue 53).
        """
        return (55.0 if self.compute_capability >= (9, 0) else 24.0) * 1e9

    @property
    def link_bandwidth(self) -> float:
        """Bytes per second that it sends to other GPUs of its host."""
        return self.nvlink_gb_s * 1e9 or self.host_bandwidth

    def target_description(self) -> str:
        """The GPU as a GpuTargetConfigProto in text form, which XLA's compiler takes instead of a device."""
        major, minor = self.compute_capability
        core = _CORES[self.compute_capability]
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.multiprocessors}
              fpus_per_core: {core.float32_lanes}
              threads_per_core_limit: {core.threads}
              shared_memory_per_core: {core.shared_kib * 1024}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {(core.shared_kib - 1) * 1024}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_block_limit: 1024
              threads_per_warp: 32
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              memory_bandwidth: {round(self.bandwidth)}
              l2_cache_size: {self.l2_mib * 2**20}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 12 minor: 8 }}
            device_description_str: "{self.name}"
        """


@dataclasses.dataclass(frozen=True)
class _Core:
    """The multiprocessor of one compute capability (CUDA C++ Programming Guide, technical specifications)."""

    shared_kib: int
    threads: int
    float32_lanes: int


_CORES = {
    (8, 0): _Core(164, 2048, 64),
    (8, 6): _Core(100, 1536, 128),
    (8, 9): _Core(100, 1536, 128),
    (9, 0): _Core(228, 2048, 128),
    (10, 0): _Core(228, 2048, 128),
    (12, 0): _Core(100, 1536, 128),
}

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 40960, 1555.0, 312.0, (8, 0), 108, 1.41, 40, 300.0),
        Gpu("a100-80gb", 81920, 2039.0, 312.0, (8, 0), 108, 1.41, 40, 300.0),
        Gpu("h100-80gb", 81559, 3352.0, 989.0, (9, 0), 132, 1.98, 50, 450.0),
        Gpu("h200", 143771, 4800.0, 989.0, (9, 0), 132, 1.98, 50, 450.0),
        Gpu("b200", 183359, 8000.0, 2250.0, (10, 0), 148, 1.97, 126, 900.0),
        Gpu("l40s", 46068, 864.0, 362.0, (8, 9), 142, 2.52, 96),
        Gpu("a6000", 49140, 768.0, 155.0, (8, 6), 84, 1.80, 6),
        Gpu("a10g", 23028, 600.0, 70.0, (8, 6), 80, 1.71, 6),
        Gpu("l4", 23034, 300.0, 121.0, (8, 9), 58, 2.04, 48),
        Gpu("rtx3090", 24576, 936.0, 71.0, (8, 6), 82, 1.70, 6),
        Gpu("rtx4090", 24564, 1008.0, 165.0, (8, 9), 128, 2.52, 72),
        Gpu("rtx4080", 16376, 717.0, 97.0, (8, 9), 76, 2.51, 64),
    )
}

_DEVICE_KINDS = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA A10G": "a10g",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 4080": "rtx4080",
}
"""GPU names by the driver's, which is jax's `device_kind`. Slower variants (H100 PCIe, H100 NVL) have other names."""

_WITHOUT_BF16 = {"p100": (6, 0), "v100": (7, 0), "t4": (7, 5), "rtx2080ti": (7, 5)}


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`, or the one described in the file `name` if it ends in ".json".

    Raises LayoutError on an unknown name, a file that does not describe a GPU, or a GPU without bfloat16.
    """
    if name.endswith(".json"):
        return _from_file(Path(name))
    key = name.lower()
    if key in _WITHOUT_BF16:
        _raise_unsupported(name, _WITHOUT_BF16[key])
    if key not in GPUS:
        raise LayoutError(
            f"unknown GPU {name!r}; choose one of {', '.join(GPUS)}, or describe yours in a file and give --gpu "
            f"mine.json: {json.dumps(dataclasses.asdict(GPUS['rtx3090']))}"
        )
    return GPUS[key]


def gpu_of_device(kind: str) -> Gpu | None:
    """The GPU whose `jax.Device.device_kind` is `kind`; None if it is not in the table."""
    return GPUS.get(_DEVICE_KINDS.get(kind, ""))


def _from_file(file: Path) -> Gpu:
    try:
        values = json.loads(file.read_text())
        gpu = Gpu(**values | {"compute_capability": tuple(values["compute_capability"])})
        numbers = (gpu.memory_mib, gpu.bandwidth_gb_s, gpu.bf16_tflops, gpu.multiprocessors, gpu.clock_ghz, gpu.l2_mib)
        if not all(number > 0 for number in numbers):
            raise ValueError("all numbers must be above 0")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LayoutError(
            f"{file} does not describe a GPU ({error}); write {json.dumps(dataclasses.asdict(GPUS['rtx3090']))}"
        ) from None
    if gpu.compute_capability not in _CORES:
        _raise_unsupported(gpu.name, gpu.compute_capability)
    return gpu


def _raise_unsupported(name: str, capability: tuple[int, int]) -> NoReturn:
    version = ".".join(map(str, capability))
    if capability < (8, 0):
        raise LayoutError(
            f"{name} (compute capability {version}) has no bfloat16, which the model computes in; "
            "choose a GPU of compute capability 8.0 or newer"
        )
    known = ", ".join(".".join(map(str, key)) for key in _CORES)
    raise LayoutError(f"{name}: compute capability {version} is unknown; the known ones are {known}")
