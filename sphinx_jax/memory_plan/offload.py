"""What inference takes while its layers stay in host memory: the engine's programs, a layer at a time."""

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
    """Jobs and state; what lies on the devices of the weights, two layers of them; bytes of all layers a device."""
    around, layers = split_layers(params)
    programs = LayerPrograms(config, config.language.vocab_size, mesh)
    asked = AbstractInputs(config, programs.around, params, mesh, max_num_seqs, max_model_len)
    state, layer, rest = asked.state, layers[0], asked.state._replace(cache=[])
    ending = asked.sampling, asked.stops
    jobs = asked.encode_jobs(around)

    def hidden(batch: int, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        dtype, place = around["language"]["embedding"]["table"].dtype, programs.hidden_sharding(batch, length)
        x = jax.ShapeDtypeStruct((batch, length, config.language.dim), dtype, sharding=place)
        return x, asked.whole((batch, length))

    def reading(name: str, text: int, words: tuple | None, first_chunk: bool) -> None:
        chunk, length = asked.chunk(text), text + (config.num_image_tokens if words else 0)
        x, positions = hidden(asked.batch, length)
        begin = programs.prefill_embed(asked.batch, length)
        jobs.append(Job(f"begin {name}", begin, (around, chunk, words), (0,)))
        through = programs.prefill_layer(state.cache[0], asked.batch, length, first_chunk)
        jobs.append(Job(f"a layer of {name}", through, (layer, x, positions, state.cache[0], chunk), (0, 3)))
        jobs.append(Job(f"end {name}", programs.prefill_finish(rest), (around, rest, chunk, x, *ending), (0, 1)))

    reading("a prompt's beginning", asked.text, asked.words, first_chunk=True)
    if asked.reads_on:
        reading("reading on", asked.piece, None, first_chunk=False)
    x, positions = hidden(state.max_num_seqs, 1)
    jobs.append(Job("begin one token", programs.decode_embed(state.max_num_seqs), (around, rest), (0, 1)))
    jobs.append(Job("end one token", programs.decode_finish(rest), (around, rest, x, *ending), (0, 1)))
    one = programs.decode_layer(state.cache[0])
    jobs.append(Job("a layer of one token", one, (layer, x, positions, state.cache[0]), (0, 3)))
    on_device = around | {"language": around["language"] | {"layers": layers[:2]}}
    return jobs, state, on_device, bytes_per_device(layers)
