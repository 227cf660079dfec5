"""What inference takes: the engine's programs for requests of a given size."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

import sharding
from sharding import MeshShape, bytes_per_device
from sphinx_jax.config import SphinxConfig
from sphinx_jax.costs import Cost, Work, decode_bytes, forward_flops, fraction_of_parameters
from sphinx_jax.errors import UserError
from sphinx_jax.hardware import Gpu
from sphinx_jax.inference import steps
from sphinx_jax.inference.bucketing import prefill_tokens
from sphinx_jax.kernels.quantized import Kind
from sphinx_jax.memory_plan.abstract_inputs import AbstractInputs
from sphinx_jax.memory_plan.aot import planning_mesh
from sphinx_jax.memory_plan.jobs import Job, compile_jobs
from sphinx_jax.memory_plan.mesh_sweep import mesh_flags
from sphinx_jax.memory_plan.offload import offload_jobs
from sphinx_jax.memory_plan.report import Plan
from sphinx_jax.model import SphinxMoE
from sphinx_jax.quantization import abstract_quantized_params


def inference_plan(
    name: str,
    config: SphinxConfig,
    gpu: Gpu,
    shape: MeshShape,
    *,
    dtype: str,
    quantize: Kind | None = None,
    offload: bool = False,
    max_num_seqs: int,
    max_model_len: int,
) -> Plan:
    """What `infer.py` takes: `max_num_seqs` answers at a time, each with a picture if the model sees any, up to `max_model_len`
    positions. Raises UserError or LayoutError where that cannot be.
    """
    if max_model_len <= config.num_image_tokens:
        raise UserError(
            f"--max-model-len {max_model_len} is too short: the picture alone takes {config.num_image_tokens} positions"
        )
    mesh, compiler = planning_mesh(gpu, shape)
    make = lambda rngs: SphinxMoE(config, unstacked=True, rngs=rngs)
    graph, params = sharding.abstract_params(make, mesh, dtype=jnp.dtype(dtype))
    if quantize:
        params = abstract_quantized_params(params, quantize)
    weights = params
    if offload:
        jobs, state, weights, waiting = offload_jobs(config, params, mesh, max_num_seqs, max_model_len)
    else:
        jobs, state = inference_jobs(config, graph, params, mesh, max_num_seqs, max_model_len)
    programs = compile_jobs(jobs, mesh)

    cache = bytes_per_device(state.cache)
    resident = bytes_per_device(state._replace(cache=[]))
    passing = {job.name: job.passing_bytes() for job in jobs}
    within = {p.name: p.memory.temporaries + p.memory.results + passing[p.name] for p in programs}
    largest = max(within, key=within.get)
    read = Work(max_num_seqs, max_model_len, max_model_len, 1, max_num_seqs if config.vision else 0)
    flops = sum(forward_flops(config, params, mesh, read).values(), Cost(0.0, 0.0))
    loaded = decode_bytes(config, params, mesh, max_num_seqs, max_model_len)
    one = Work(max_num_seqs, 1, max_model_len, 1)
    decoding = max(
        loaded.busiest / gpu.bandwidth, forward_flops(config, params, mesh, one)["language"].busiest / gpu.bf16_flops
    )
    reading = flops.busiest / gpu.bf16_flops
    notes = ()
    if offload:
        passes = -(-(max_model_len - config.num_image_tokens) // prefill_tokens(mesh))
        decoding = max(decoding, waiting / gpu.host_bandwidth)
        reading = max(reading, passes * waiting / gpu.host_bandwidth)
        notes = (
            f"In host memory: {waiting / 2**30:.1f} GiB of layers for each device, copied to it for every token; on it "
            "are two layers at a time.",
        )
    flags = (
        [f"--quantize {quantize}"] * bool(quantize) + ["--offload"] * offload + [mesh_flags(shape)] * (shape.size > 1)
    )
    numbers = f"{dtype}, matrices {quantize}" if quantize else dtype
    return Plan(
        job=f"{name}, {numbers}, {max_num_seqs} answer{'s' * (max_num_seqs > 1)} of {max_model_len:,} positions at a time",
        gpu=gpu,
        mesh=dict(mesh.shape),
        compiler=compiler,
        parameters={part: bytes_per_device(tree) for part, tree in weights.items()},
        optimizer=0,
        gradients=0,
        kv_cache=cache,
        inputs=resident + passing[largest],
        temporaries=within[largest] - passing[largest],
        share={"parameters": fraction_of_parameters(params), "flops": flops.busiest / flops.total},
        roofline={
            "decode_seconds_per_token_at_least": decoding,
            "decode_tokens_per_second_at_most": max_num_seqs / decoding,
            "prefill_seconds_at_least": reading,
            "prefill_tokens_per_second_at_most": max_num_seqs * max_model_len / reading,
        },
        programs=programs,
        main_program=jobs[-1].name,
        speed=max_num_seqs / decoding,
        command=" ".join(("python infer.py", f"--checkpoint {name.upper()} --max-model-len {max_model_len}", *flags)),
        notes=notes,
    )


def inference_jobs(
    config: SphinxConfig, graph: Any, params: Any, mesh: Mesh, max_num_seqs: int, max_model_len: int
) -> tuple[list[Job], steps.State]:
    """(name, program, abstract arguments) of all that the engine runs for such requests, and its state."""
    asked = AbstractInputs(config, graph, params, mesh, max_num_seqs, max_model_len)
    programs, state = asked.programs, asked.state
    jobs = asked.encode_jobs(params)
    first = (params, state, asked.chunk(asked.text), asked.words, asked.sampling, asked.stops)
    jobs.append(Job("read a prompt's beginning", programs.prefill(state, first_chunk=True), first, (0, 1)))
    if asked.reads_on:
        further = (params, state, asked.chunk(asked.piece), None, asked.sampling, asked.stops)
        jobs.append(Job("read on", programs.prefill(state, first_chunk=False), further, (0, 1)))
    decode = (params, state, asked.sampling, asked.stops, asked.whole(()), asked.whole(()))
    jobs.append(Job("decode one token", programs.decode(state), decode, (0, 1)))
    return jobs, state
