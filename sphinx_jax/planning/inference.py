"""What inference takes: the engine's programs for requests of a given size."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import sharding
from sharding import MeshShape, bytes_per_device
from sharding.plan import Gpu, Plan, planning_mesh
from sphinx_jax.config import SphinxConfig
from sphinx_jax.costs import Cost, Work, decode_bytes, forward_flops, share_of_parameters
from sphinx_jax.errors import UserError
from sphinx_jax.inference import steps
from sphinx_jax.inference.engine import ENCODE_PIXELS, PREFILL_TOKENS, bucket, power_of_two, slots_for
from sphinx_jax.inference.programs import Programs
from sphinx_jax.inference.sampling import Sampling
from sphinx_jax.inference.serving import PREFILL_ROWS
from sphinx_jax.model import SphinxMoE
from sphinx_jax.planning.jobs import Job, compile_jobs
from sphinx_jax.planning.meshes import mesh_flags

STOP_STATES = 32
"""Rows of the table of stop strings (`inference.stopping`), unless there are many of them."""


def inference_plan(
    name: str, config: SphinxConfig, gpu: Gpu, shape: MeshShape, *, dtype: str, rows: int, context: int
) -> Plan:
    """What `infer.py` takes: `rows` answers at a time, each with a picture if the model sees any, up to `context`
    positions. Raises UserError or LayoutError where that cannot be.
    """
    if context <= config.image_words:
        raise UserError(f"--context {context} is too short: the picture alone takes {config.image_words} positions")
    mesh, compiler = planning_mesh(gpu, shape)
    make = lambda rngs: SphinxMoE(config, apart=True, rngs=rngs)
    graph, params = sharding.abstract_params(make, mesh, dtype=jnp.dtype(dtype))
    jobs, state = inference_jobs(config, graph, params, mesh, rows, context)
    programs = compile_jobs(jobs, mesh)

    cache = bytes_per_device(state.cache)
    resident = bytes_per_device(state._replace(cache=[]))
    others = {job.name: sum(bytes_per_device(arg) for arg in job.args[2:]) for job in jobs}
    others["encode pictures"] = bytes_per_device(jobs[0].args[1]) if config.vision else 0
    within = {p.name: p.memory.temporaries + p.memory.results + others[p.name] for p in programs}
    largest = max(within, key=within.get)
    read = Work(rows, context, context, 1, rows if config.vision else 0)
    flops = sum(forward_flops(config, params, mesh, read).values(), Cost(0.0, 0.0))
    loaded = decode_bytes(config, params, mesh, rows, context)
    one = Work(rows, 1, context, 1)
    decoding = max(
        loaded.busiest / gpu.bandwidth, forward_flops(config, params, mesh, one)["language"].busiest / gpu.bf16_flops
    )
    return Plan(
        job=f"{name}, {dtype}, {rows} answer{'s' * (rows > 1)} of {context:,} positions at a time",
        gpu=gpu,
        mesh=dict(mesh.shape),
        compiler=compiler,
        parameters={part: bytes_per_device(tree) for part, tree in params.items()},
        optimizer=0,
        gradients=0,
        kv_cache=cache,
        inputs=resident + others[largest],
        temporaries=within[largest] - others[largest],
        share={"parameters": share_of_parameters(params), "flops": flops.busiest / flops.total},
        roofline={
            "decode_seconds_per_token_at_least": decoding,
            "decode_tokens_per_second_at_most": rows / decoding,
            "prefill_seconds_at_least": flops.busiest / gpu.bf16_flops,
            "prefill_tokens_per_second_at_most": rows * context * gpu.bf16_flops / flops.busiest,
        },
        programs=programs,
        main_program="decode one token",
        speed=rows / decoding,
        command=f"python infer.py --checkpoint {name.upper()} --context {context} {mesh_flags(shape)}".rstrip(),
    )


def inference_jobs(
    config: SphinxConfig, graph: Any, params: Any, mesh: Mesh, rows: int, context: int
) -> tuple[list[Job], steps.State]:
    """(name, program, abstract arguments) of all that the engine runs for such requests, and its state."""
    vocab = config.language.vocab_size
    dtype = params["language"]["embedding"]["table"].dtype
    programs = Programs(config, graph, vocab, mesh, dtype)
    # The longest prompt there can be; its last chunk is padded, so that the cache may be longer than the context.
    slots = slots_for(context - config.image_words - 1, config.image_words, 1, context)
    state = programs.abstract_state(rows, slots)
    whole = lambda shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=programs.everywhere)
    sampling = jax.tree.map(lambda x: whole((), np.asarray(x).dtype), Sampling().values())
    stops = whole((STOP_STATES, vocab), jnp.int16)
    batch = power_of_two(min(rows, PREFILL_ROWS))

    def chunk(text: int) -> steps.Chunk:
        return steps.Chunk(
            row=whole((batch,)),
            tokens=whole((batch, text)),
            length=whole((batch,)),
            start=whole((batch,)),
            limit=whole((batch,)),
            seeds=whole((batch, 2), jnp.uint32),
            seen=whole((batch, vocab), jnp.bool_),
        )

    jobs: list[Job] = []
    words = None
    if vision := config.vision:
        at_once = power_of_two(min(batch, max(1, ENCODE_PIXELS // vision.image_size**2)))
        images = whole((at_once, vision.image_size, vision.image_size, 3), jnp.float32)
        jobs.append(Job("encode pictures", programs.encode(), (params, images)))
        words = (whole((vision.views, vision.view_words, config.language.dim), dtype),) * batch
    text = bucket(min(PREFILL_TOKENS, context - config.image_words))
    first = (params, state, chunk(text), words, sampling, stops)
    jobs.append(Job("read a prompt's beginning", programs.prefill(state, fresh=True), first))
    if context - config.image_words > PREFILL_TOKENS:
        further = (params, state, chunk(PREFILL_TOKENS), None, sampling, stops)
        jobs.append(Job("read on", programs.prefill(state, fresh=False), further))
    decode = (params, state, sampling, stops, whole(()), whole(()))
    jobs.append(Job("decode one token", programs.decode(state), decode))
    return jobs, state
