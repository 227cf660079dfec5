"""Inference jobs with the experts in host memory, and what the experts that the devices keep are worth."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from sharding import bytes_per_device
from sphinx_jax.config import SphinxConfig
from sphinx_jax.hardware import GIB
from sphinx_jax.inference import steps
from sphinx_jax.inference.engine import IMAGE_CACHE_BYTES
from sphinx_jax.inference.expert_cache import SPARE, best_fit, expected_copies
from sphinx_jax.inference.offload_engine import offload_prefill_tokens
from sphinx_jax.inference.offload_params import abstract_on_device, encoders_of, split_experts
from sphinx_jax.inference.offload_programs import OffloadPrograms
from sphinx_jax.memory_plan.abstract_inputs import AbstractInputs
from sphinx_jax.memory_plan.jobs import Job
from sphinx_jax.memory_plan.report import Plan
from sphinx_jax.quantization import has_quantized


@dataclasses.dataclass(frozen=True)
class OffloadSizes:
    """What decides how many experts are kept; bytes are those of one device."""

    num_layers: int
    num_experts: int
    """Of a layer."""
    experts_per_token: int
    expert_bytes: int
    encoder_bytes: int
    num_chunks: int
    """Chunks in which the longest prompt is prefilled."""


def offload_jobs(
    config: SphinxConfig, params: Any, mesh: Mesh, max_num_seqs: int, max_model_len: int
) -> tuple[list[Job], steps.State, dict, OffloadSizes]:
    """Jobs, state, the parameters that device memory holds at least, and sizes; `params` as `abstract_offloaded`.

    A prefill or decode step is four programs: "embed", "attend" (run once per layer), "expert" (once for each expert
    that is selected) and "finish".
    """
    outside, layers, experts = split_experts(params)
    programs = OffloadPrograms(config, config.language.vocab_size, mesh, has_quantized(params))
    chunk_len = offload_prefill_tokens(mesh, max_model_len)
    inputs = AbstractInputs(config, programs.graph, params, mesh, max_num_seqs, max_model_len, chunk_len)
    state, layer, rest, stops = inputs.state, layers[0], inputs.state.without_cache, inputs.stops
    expert = abstract_on_device(experts[0][0])
    layer_cache, layer_prefixes = state.cache[0], state.prefixes[0] if state.prefixes else None
    dtype = outside["language"]["embedding"]["table"].dtype
    number = inputs.replicated(())
    jobs = inputs.encode_jobs(outside)

    def add_expert(name: str, batch_size: int, length: int, is_prefill: bool) -> None:
        outputs = programs.abstract_carry(batch_size, length, dtype).outputs
        selection = programs.abstract_selection(batch_size, length, dtype)
        program = programs.expert(batch_size, length, is_prefill)
        jobs.append(Job(f"{name}, expert", program, (expert, outputs, selection, number), (0,)))

    def add_prefill(name: str, chunk: steps.Chunk, image_embeds: tuple | None, first_chunk: bool) -> None:
        batch_size, text = chunk.tokens.shape
        num_image_tokens = config.num_image_tokens if image_embeds else 0
        length = text + num_image_tokens
        carry, positions = programs.abstract_carry(batch_size, length, dtype), inputs.replicated((batch_size, length))
        embed = programs.prefill_embed(batch_size, length)
        jobs.append(Job(f"{name}, embed", embed, (outside, chunk, image_embeds), (0,)))
        attend = programs.prefill_attend(layer_cache, layer_prefixes, batch_size, length, num_image_tokens, first_chunk)
        args = (layer, carry, positions, layer_cache, layer_prefixes, chunk)
        jobs.append(Job(f"{name}, attend", attend, args, (0, 3, 4)))
        add_expert(name, batch_size, length, is_prefill=True)
        finish = programs.prefill_finish(rest)
        jobs.append(Job(f"{name}, finish", finish, (outside, rest, chunk, carry, stops, inputs.wants_top), (0, 1)))

    add_prefill("prefill", *inputs.first_chunk(), first_chunk=True)
    if inputs.needs_chunked_prefill:
        add_prefill("chunked prefill", inputs.later_chunk(), None, first_chunk=False)
    carry, positions = programs.abstract_carry(state.num_seqs, 1, dtype), inputs.replicated((state.num_seqs, 1))
    jobs.append(Job("decode step, embed", programs.decode_embed(state.num_seqs), (outside, rest), (0, 1)))
    finish = programs.decode_finish(rest)
    jobs.append(Job("decode step, finish", finish, (outside, rest, carry, stops, inputs.wants_top), (0, 1)))
    add_expert("decode step", state.num_seqs, 1, is_prefill=False)
    # Last: its collectives are the ones that a plan reports.
    decode = programs.decode_attend(layer_cache, state.cache_len)
    done = inputs.replicated((state.num_seqs,), jnp.bool_)
    jobs.append(Job("decode step, attend", decode, (layer, carry, positions, layer_cache, done), (0, 3)))
    sizes = OffloadSizes(
        len(layers),
        config.language.num_experts,
        config.language.experts_per_token,
        bytes_per_device(expert),
        bytes_per_device(encoders_of(params)),
        -(-inputs.max_text_len // chunk_len),
    )
    on_device = outside | {"language": outside["language"] | {"layers": layers}, "experts": [expert] * SPARE}
    return jobs, state, on_device, sizes


def with_kept_experts(plan: Plan, sizes: OffloadSizes, max_num_seqs: int) -> Plan:
    """The plan with its headroom given to experts: how many are kept, and how fast it is then at most.

    The parameters of `plan` include SPARE experts and the encoders.
    """
    total, expert_bytes = sizes.num_layers * sizes.num_experts, sizes.expert_bytes
    free = plan.headroom + SPARE * expert_bytes - (IMAGE_CACHE_BYTES if sizes.encoder_bytes else 0)
    kept, move_encoders = best_fit(free, expert_bytes, total, sizes.encoder_bytes)
    copies = expected_copies(max_num_seqs, kept, sizes.num_layers, sizes.num_experts, sizes.experts_per_token)
    copy_seconds = expert_bytes / plan.gpu.host_bandwidth
    roofline = dict(plan.roofline)
    num_tokens = roofline["prefill_tokens_per_second_at_most"] * roofline["prefill_seconds_at_least"]
    decode_seconds = max(roofline["decode_seconds_per_token_at_least"], copies * copy_seconds)
    prefill_seconds = max(roofline["prefill_seconds_at_least"], sizes.num_chunks * max(total - kept, 0) * copy_seconds)
    place = "host memory while no image is encoded" if move_encoders else "device memory"
    encoders = f" The vision encoders are in {place}." if sizes.encoder_bytes else ""
    note = (
        f"Each device keeps {kept} of {total} experts, {kept / sizes.num_layers:.1f} of {sizes.num_experts} a layer. A "
        f"decode step copies {copies:.1f} on average if routing is uniform, {copies * expert_bytes / GIB:.2f} GiB."
    )
    return dataclasses.replace(
        plan,
        roofline={
            "decode_seconds_per_token_at_least": decode_seconds,
            "decode_tokens_per_second_at_most": max_num_seqs / decode_seconds,
            "prefill_seconds_at_least": prefill_seconds,
            "prefill_tokens_per_second_at_most": num_tokens / prefill_seconds,
        },
        tokens_per_second=max_num_seqs / decode_seconds,
        notes=(*plan.notes, note + encoders),
        pinned=total * expert_bytes + sizes.encoder_bytes * move_encoders,
        offload={
            "experts": total,
            "experts_kept": kept,
            "expert_bytes": expert_bytes,
            "copies_per_decode_step": copies,
            "encoders_in_host_memory": move_encoders,
        },
    )
