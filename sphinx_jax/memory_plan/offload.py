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
    inputs = AbstractInputs(config, programs.around, params, mesh, max_num_seqs, max_model_len)
    state, layer, rest = inputs.state, layers[0], inputs.state._replace(cache=[])
    sampling_args = inputs.sampling, inputs.stop_table
    jobs = inputs.encode_jobs(around)

    def hidden(batch_size: int, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Hidden states [batch, length, dim] and positions [batch, length]."""
        dtype = around["language"]["embedding"]["table"].dtype
        placement = programs.hidden_sharding(batch_size, length)
        x = jax.ShapeDtypeStruct((batch_size, length, config.language.dim), dtype, sharding=placement)
        return x, inputs.replicated((batch_size, length))

    def add_prefill(name: str, text_len: int, image_embeds: tuple | None, first_chunk: bool) -> None:
        chunk, length = inputs.chunk(text_len), text_len + (config.num_image_tokens if image_embeds else 0)
        x, positions = hidden(inputs.batch_size, length)
        embed = programs.prefill_embed(inputs.batch_size, length)
        jobs.append(Job(f"{name}, embed", embed, (around, chunk, image_embeds), (0,)))
        through = programs.prefill_layer(state.cache[0], inputs.batch_size, length, first_chunk)
        jobs.append(Job(f"{name}, layer", through, (layer, x, positions, state.cache[0], chunk), (0, 3)))
        finish = programs.prefill_finish(rest)
        jobs.append(Job(f"{name}, finish", finish, (around, rest, chunk, x, *sampling_args), (0, 1)))

    add_prefill("prefill", inputs.first_chunk_len, inputs.image_embeds, first_chunk=True)
    if inputs.needs_chunked_prefill:
        add_prefill("chunked prefill", inputs.chunk_len, None, first_chunk=False)
    x, positions = hidden(state.num_seqs, 1)
    jobs.append(Job("decode step, embed", programs.decode_embed(state.num_seqs), (around, rest), (0, 1)))
    jobs.append(Job("decode step, finish", programs.decode_finish(rest), (around, rest, x, *sampling_args), (0, 1)))
    # Last: its collectives are the ones that a plan reports.
    decode_layer = programs.decode_layer(state.cache[0])
    jobs.append(Job("decode step, layer", decode_layer, (layer, x, positions, state.cache[0]), (0, 3)))
    # While one layer computes, the next one is copied from host memory.
    on_device = around | {"language": around["language"] | {"layers": layers[:2]}}
    return jobs, state, on_device, bytes_per_device(layers)
