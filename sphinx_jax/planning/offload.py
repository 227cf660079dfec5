"""What inference takes while its layers stay in host memory: the engine's programs, a layer at a time."""

from typing import Any

import jax
from jax.sharding import Mesh

from sharding import bytes_per_device
from sphinx_jax.config import SphinxConfig
from sphinx_jax.inference import steps
from sphinx_jax.inference.offload import LayerPrograms, split_layers
from sphinx_jax.planning.asked import Asked
from sphinx_jax.planning.jobs import Job


def offload_jobs(
    config: SphinxConfig, params: Any, mesh: Mesh, rows: int, context: int
) -> tuple[list[Job], steps.State, dict, int]:
    """Jobs and state; what lies on the devices of the weights, two layers of them; bytes of all layers a device."""
    around, layers = split_layers(params)
    programs = LayerPrograms(config, config.language.vocab_size, mesh)
    asked = Asked(config, programs.around, params, mesh, rows, context)
    state, layer, rest = asked.state, layers[0], asked.state._replace(cache=[])
    ending = asked.sampling, asked.stops
    jobs = asked.encode_jobs(around)

    def hidden(batch: int, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        dtype, place = around["language"]["embedding"]["table"].dtype, programs.hidden_sharding(batch, length)
        x = jax.ShapeDtypeStruct((batch, length, config.language.dim), dtype, sharding=place)
        return x, asked.whole((batch, length))

    def reading(name: str, text: int, words: tuple | None, fresh: bool) -> None:
        chunk, length = asked.chunk(text), text + (config.image_words if words else 0)
        x, positions = hidden(asked.batch, length)
        begin = programs.begin_chunk(asked.batch, length)
        jobs.append(Job(f"begin {name}", begin, (around, chunk, words), (0,)))
        through = programs.chunk_layer(state.cache[0], asked.batch, length, fresh)
        jobs.append(Job(f"a layer of {name}", through, (layer, x, positions, state.cache[0], chunk), (0, 3)))
        jobs.append(Job(f"end {name}", programs.end_chunk(rest), (around, rest, chunk, x, *ending), (0, 1)))

    reading("a prompt's beginning", asked.text, asked.words, fresh=True)
    if asked.reads_on:
        reading("reading on", asked.piece, None, fresh=False)
    x, positions = hidden(state.rows, 1)
    jobs.append(Job("begin one token", programs.begin_token(state.rows), (around, rest), (0, 1)))
    jobs.append(Job("end one token", programs.end_token(rest), (around, rest, x, *ending), (0, 1)))
    one = programs.token_layer(state.cache[0])
    jobs.append(Job("a layer of one token", one, (layer, x, positions, state.cache[0]), (0, 3)))
    on_device = around | {"language": around["language"] | {"layers": layers[:2]}}
    return jobs, state, on_device, bytes_per_device(layers)
