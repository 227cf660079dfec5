"""The plan of inference: the engine's programs for a number of sequences of a given length."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

import sharding
from sharding import MeshShape, bytes_per_device
from sphinx_jax.config import LoraConfig, SphinxConfig
from sphinx_jax.costs import Cost, Workload, decode_bytes, forward_flops, fraction_of_parameters
from sphinx_jax.errors import UserError
from sphinx_jax.hardware import Gpu
from sphinx_jax.inference import steps
from sphinx_jax.inference.capacity import MOST_ON_GPU, max_num_seqs
from sphinx_jax.inference.offload_params import abstract_offloaded
from sphinx_jax.kernels.quantized import QuantizedDtype
from sphinx_jax.memory_plan.abstract_inputs import AbstractInputs
from sphinx_jax.memory_plan.aot import planning_mesh
from sphinx_jax.memory_plan.jobs import Job, compile_jobs
from sphinx_jax.memory_plan.mesh_sweep import mesh_flags
from sphinx_jax.memory_plan.offload import offload_jobs, with_kept_experts
from sphinx_jax.memory_plan.report import RESERVE_BYTES, Plan
from sphinx_jax.model import SphinxMoE
from sphinx_jax.quantization import abstract_quantized_params, has_quantized


def inference_plan(
    name: str,
    config: SphinxConfig,
    gpu: Gpu,
    shape: MeshShape,
    *,
    dtype: str,
    quantize: QuantizedDtype | None = None,
    offload: bool = False,
    max_num_seqs: int,
    max_model_len: int,
    lora: LoraConfig | None = None,
) -> Plan:
    """The plan of `infer.py` for `max_num_seqs` sequences of up to `max_model_len` tokens, image tokens included.

    Each sequence has an image if the model has vision. `lora` is the size of all adapters that are served. Raises
    UserError or LayoutError if that is impossible.
    """
    if max_model_len <= config.num_image_tokens:
        raise UserError(
            f"--max-model-len {max_model_len} is too short: an image alone takes {config.num_image_tokens} tokens"
        )
    mesh, compiler = planning_mesh(gpu, shape)
    graph, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(config, unstacked=True, lora=lora, rngs=rngs), mesh, dtype=jnp.dtype(dtype)
    )
    unquantized = params
    if quantize:
        params = abstract_quantized_params(params, quantize)
    device_params, offload_sizes = params, None
    if offload:
        placed = abstract_offloaded(unquantized, quantize)
        jobs, state, device_params, offload_sizes = offload_jobs(config, placed, mesh, max_num_seqs, max_model_len)
    else:
        jobs, state = inference_jobs(config, graph, params, mesh, max_num_seqs, max_model_len)
    programs = compile_jobs(jobs, mesh)

    # Programs run one at a time: what counts is the largest sum of transient arguments, results and temporaries.
    transient = {job.name: job.transient_bytes() for job in jobs}
    working_set = {p.name: p.memory.temporaries + p.memory.results + transient[p.name] for p in programs}
    largest = max(working_set, key=lambda program: working_set[program])

    # Roofline: a decode step reads the active parameters and the KV cache, or computes; prefill computes.
    prefill_work = Workload(max_num_seqs, max_model_len, max_model_len, 1, max_num_seqs if config.vision else 0)
    prefill_flops = sum(forward_flops(config, params, mesh, prefill_work).values(), Cost(0.0, 0.0))
    decode_flops = forward_flops(config, params, mesh, Workload(max_num_seqs, 1, max_model_len, 1))["language"]
    decode_read = decode_bytes(config, params, mesh, max_num_seqs, max_model_len)
    decode_seconds = max(decode_read.per_device_max / gpu.bandwidth, decode_flops.per_device_max / gpu.bf16_flops)
    prefill_seconds = prefill_flops.per_device_max / gpu.bf16_flops
    flags = (
        [f"--quantize {quantize}"] * bool(quantize) + ["--offload"] * offload + [mesh_flags(shape)] * (shape.size > 1)
    )
    number_format = f"{dtype}, weight-only {quantize}" if quantize else dtype
    plan = Plan(
        job=f"{name}, {number_format}, {max_num_seqs} sequence{'s' * (max_num_seqs > 1)} × {max_model_len:,} tokens",
        gpu=gpu,
        mesh=dict(mesh.shape),
        compiler=compiler,
        parameters={part: bytes_per_device(tree) for part, tree in device_params.items()},
        optimizer=0,
        gradients=0,
        kv_cache=bytes_per_device([state.cache, state.prefixes]),
        inputs=bytes_per_device(state.without_cache) + transient[largest],
        temporaries=working_set[largest] - transient[largest],
        share={
            "parameters": fraction_of_parameters(params),
            "flops": prefill_flops.per_device_max / prefill_flops.total,
        },
        roofline={
            "decode_seconds_per_token_at_least": decode_seconds,
            "decode_tokens_per_second_at_most": max_num_seqs / decode_seconds,
            "prefill_seconds_at_least": prefill_seconds,
            "prefill_tokens_per_second_at_most": max_num_seqs * max_model_len / prefill_seconds,
        },
        programs=programs,
        main_program=jobs[-1].name,
        tokens_per_second=max_num_seqs / decode_seconds,
        command=" ".join(("python infer.py", f"--checkpoint {name.upper()} --max-model-len {max_model_len}", *flags)),
    )
    return with_kept_experts(plan, offload_sizes, max_num_seqs) if offload_sizes else plan


def largest_plan(name: str, config: SphinxConfig, gpu: Gpu, shape: MeshShape, **options: Any) -> Plan:
    """The plan of `infer.py` for as many sequences as fit, as `inference.capacity` counts them; for one that does not
    fit if none does. `options` are those of `inference_plan` besides the number.
    """
    mesh, _ = planning_mesh(gpu, shape)
    groups = sharding.num_shards("batch", mesh)
    graph, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(config, unstacked=True, lora=options.get("lora"), rngs=rngs),
        mesh,
        dtype=jnp.dtype(options["dtype"]),
    )

    if quantize := options.get("quantize"):
        params = abstract_quantized_params(params, quantize)

    def state_bytes(number: int) -> int:
        return bytes_per_device(AbstractInputs(config, graph, params, mesh, number, options["max_model_len"]).state)

    def most(free_bytes: int) -> int:
        try:
            return max_num_seqs(free_bytes, state_bytes, groups, MOST_ON_GPU)
        except UserError:
            return groups

    def plan(number: int) -> Plan:
        return inference_plan(name, config, gpu, shape, max_num_seqs=number, **options)

    # Temporaries are known once a number is compiled: first for what would fit without them. Fewer sequences have no
    # more of them.
    above = most(gpu.pool_bytes - RESERVE_BYTES - (0 if options.get("offload") else bytes_per_device(params)))
    without_temporaries = plan(above)
    fitting = most(without_temporaries.headroom + state_bytes(above))
    return without_temporaries if fitting == above else plan(fitting)


def inference_jobs(
    config: SphinxConfig, graph: Any, params: Any, mesh: Mesh, max_num_seqs: int, max_model_len: int
) -> tuple[list[Job], steps.State]:
    """All programs that the engine runs for such sequences, the decode step last, and the engine's abstract state."""
    inputs = AbstractInputs(config, graph, params, mesh, max_num_seqs, max_model_len)
    programs, state, stops = inputs.programs, inputs.state, inputs.stops
    jobs = inputs.encode_jobs(params)
    prefill = programs.prefill(state, first_chunk=True)
    jobs.append(Job("prefill", prefill, (params, state, *inputs.first_chunk(), stops, inputs.wants_top), (0, 1)))
    if inputs.needs_chunked_prefill:
        chunked = programs.prefill(state, first_chunk=False)
        jobs.append(
            Job(
                "chunked prefill", chunked, (params, state, inputs.later_chunk(), None, stops, inputs.wants_top), (0, 1)
            )
        )
    # Attention over the whole KV cache.
    decode = programs.decode(state, state.cache_len, has_quantized(params))
    cancelled, scalar = inputs.replicated((state.num_seqs,), jnp.bool_), inputs.replicated(())
    jobs.append(Job("decode step", decode, (params, state, cancelled, stops, scalar, scalar, inputs.wants_top), (0, 1)))
    return jobs, state
