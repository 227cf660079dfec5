"""The other side of the benchmarks: Mixtral of transformers on torch, with the same jobs.

Importing it raises ImportError where torch or transformers is missing.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jobs import DECODE_STEPS, PROMPT_LEN, time_once

from sphinx_jax.config import DecoderConfig

# transformers imports torchvision if it finds one, and that of timm does not load with a CPU build of torch.
sys.modules["torchvision"] = None  # pyright: ignore[reportArgumentType]  # None blocks the import
import torch  # noqa: E402
import transformers  # noqa: E402

EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm")
"""The faster one depends on the job."""

Run = Callable[[], None]


class TransformersModel:
    def __init__(self, model: "transformers.MixtralForCausalLM"):
        self.model = model

    @classmethod
    def from_checkpoint(cls, directory: Path) -> "TransformersModel":
        """The checkpoint in `directory`, in float32 on the CPU."""
        return cls(transformers.MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32))

    @classmethod
    def from_config(cls, config: DecoderConfig, device: str, dtype: str) -> "TransformersModel":
        """Random weights, initialised on the device."""
        hf_config = transformers.MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.experts_per_token,
            rms_norm_eps=config.norm_eps,
        )
        torch.set_default_dtype(getattr(torch, dtype))
        with torch.device(device):
            model = transformers.MixtralForCausalLM(hf_config)
        return cls(model.eval())

    def fastest(self, kind: str, *args) -> tuple[str, Run]:
        """The faster experts implementation for a job ("prefill", "decode" or "train"), and the job.

        An implementation that raises RuntimeError is skipped.
        """
        self.model.train(kind == "train")
        seconds = {}
        for name in EXPERTS_IMPLEMENTATIONS:
            self.model.set_experts_implementation(name)
            run = getattr(self, kind)(*args)
            try:
                run()
            except RuntimeError as error:
                print(f"transformers' {name} experts cannot {kind}: {error}", file=sys.stderr)
                continue
            seconds[name] = time_once(run)
        best = min(seconds, key=lambda name: seconds[name])
        self.model.set_experts_implementation(best)
        return best, getattr(self, kind)(*args)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model(self._ids(tokens)).logits.numpy()

    def prefill(self, tokens: np.ndarray) -> Run:
        ids = self._ids(tokens)

        @torch.no_grad()
        def run() -> None:
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            self._synchronize()

        return run

    def decode(self, batch_size: int) -> Run:
        ids = torch.full((batch_size, PROMPT_LEN), 5, device=self.model.device)
        with torch.no_grad():
            past = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

        @torch.no_grad()
        def run() -> None:
            for _ in range(DECODE_STEPS):
                self.model(input_ids=ids[:, :1], past_key_values=past, use_cache=True)
            past.crop(-DECODE_STEPS)
            self._synchronize()

        return run

    def train(self, tokens: np.ndarray) -> Run:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        ids = self._ids(tokens)

        def run() -> None:
            self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self._synchronize()

        return run

    def generate_batch(self, prompts: list[np.ndarray], max_new_tokens: int) -> float:
        """Seconds for all prompts, which may share blocks of the KV cache."""
        greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=max_new_tokens)
        config = transformers.ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=2048)
        inputs = [prompt.tolist() for prompt in prompts]
        start = time.perf_counter()
        results = self.model.generate_batch(inputs, greedy, config)
        assert len(results) == len(prompts)
        return time.perf_counter() - start

    def continuous_batching(self, num_blocks: int, max_batch_tokens: int) -> "ContinuousBatching":
        """Greedy decoding that requests join as they come, with so many blocks of KV cache."""
        config = transformers.ContinuousBatchingConfig(
            num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, allow_block_sharing=False
        )
        return ContinuousBatching(self.model, config)

    def _ids(self, tokens: np.ndarray) -> "torch.Tensor":
        return torch.from_numpy(tokens).long().to(self.model.device)

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


class ContinuousBatching:
    """What `generate_batch` runs on, with requests that stream."""

    def __init__(self, model: "transformers.MixtralForCausalLM", config: "transformers.ContinuousBatchingConfig"):
        greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1)
        self._manager = model.init_continuous_batching(greedy, config)
        self._manager.start()

    def submit(self, prompt: np.ndarray, max_new_tokens: int) -> str:
        """The request's name."""
        return self._manager.add_request(
            prompt.tolist(), max_new_tokens=max_new_tokens, streaming=True, eos_token_id=-1
        )

    def deliveries(self) -> list[tuple[str, bool]]:
        """The next request that has a new token, and whether it has ended. Raises RuntimeError if it failed."""
        result = self._manager.get_result(timeout=600)
        if result is None or result.error is not None:
            raise RuntimeError(f"transformers' continuous batching failed: {result and result.error}")
        return [(result.request_id, result.is_finished())]

    def stop(self) -> None:
        self._manager.stop(block=True)
