"""Inference jobs with the decoder's layers in host memory: the engine's programs, one layer at a time."""

from typing import Any

import jax
from jax.sharding import Mesh

from sharding import bytes_per_device
from sphinx_jax.config import SphinxConfig
from sphinx_jax.inference import steps
from sphinx_jax.inference.layer_offload import LayerPrograms, split_layers
from sphinx_jax.memory_plan.abstract_inputs import AbstractInputs
from sphinx_jax.memory_plan.jobs import Job


def offload_jobs(
    config: SphinxConfig, params: Any, mesh: Mesh, max_num_seqs: int, max_model_len: int
) -> tuple[list[Job], steps.State, dict, int]:
    """Jobs, state, the parameters in device memory (two layers of them), and bytes of all layers per device.

    A prefill or decode step is three programs: "embed", "layer" (run once per layer) and "finish".
    """
    around, layers = split_layers(params)
    programs = LayerPrograms(config, config.language.vocab_size, mesh)
    inputs = AbstractInputs(config, programs.graph, params, mesh, max_num_seqs, max_model_len)
    state, layer, rest, stops = inputs.state, layers[0], inputs.state.without_cache, inputs.stops
    layer_cache, layer_prefixes = state.cache[0], state.prefixes[0] if state.prefixes else None
    jobs = inputs.encode_jobs(around)

    def hidden(batch_size: int, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Hidden states [batch, length, dim] and positions [batch, length]."""
        dtype = around["language"]["embedding"]["table"].dtype
        placement = programs.hidden_sharding(batch_size, length)
        x = jax.ShapeDtypeStruct((batch_size, length, config.language.dim), dtype, sharding=placement)
        return x, inputs.replicated((batch_size, length))

    def add_prefill(name: str, chunk: steps.Chunk, image_embeds: tuple | None, first_chunk: bool) -> None:
        batch_size, length = chunk.tokens.shape
        length += config.num_image_tokens if image_embeds else 0
        x, positions = hidden(batch_size, length)
        embed = programs.prefill_embed(batch_size, length)
        jobs.append(Job(f"{name}, embed", embed, (around, chunk, image_embeds), (0,)))
        through = programs.prefill_layer(layer_cache, layer_prefixes, batch_size, length, first_chunk)
        args = (layer, x, positions, layer_cache, layer_prefixes, chunk)
        jobs.append(Job(f"{name}, layer", through, args, (0, 3, 4)))
        finish = programs.prefill_finish(rest)
        jobs.append(Job(f"{name}, finish", finish, (around, rest, chunk, x, stops, inputs.wants_top), (0, 1)))

    add_prefill("prefill", *inputs.first_chunk(), first_chunk=True)
    if inputs.needs_chunked_prefill:
        add_prefill("chunked prefill", inputs.later_chunk(), None, first_chunk=False)
    x, positions = hidden(state.num_seqs, 1)
    jobs.append(Job("decode step, embed", programs.decode_embed(state.num_seqs), (around, rest), (0, 1)))
    finish = programs.decode_finish(rest)
    jobs.append(Job("decode step, finish", finish, (around, rest, x, stops, inputs.wants_top), (0, 1)))
    # Last: its collectives are the ones that a plan reports.
    decode_layer = programs.decode_layer(layer_cache, state.cache_len)
    jobs.append(Job("decode step, layer", decode_layer, (layer, x, positions, layer_cache), (0, 3)))
    # While one layer computes, the next one is copied from host memory.
    on_device = around | {"language": around["language"] | {"layers": layers[:2]}}
    return jobs, state, on_device, bytes_per_device(layers)
