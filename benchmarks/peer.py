"""The other side of the benchmarks: transformers' Mixtral on torch, doing the same work.

Importing it raises ImportError where torch or transformers is missing.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jobs import DECODED, MAX_MODEL_LEN, clock

from sphinx_jax.config import DecoderConfig

# timm's torchvision does not import beside a CPU torch, and transformers would try to; Mixtral needs none.
sys.modules["torchvision"] = None
import torch  # noqa: E402
import transformers  # noqa: E402

EXPERTS = ("eager", "grouped_mm")
"""Its forms of the experts; which is the faster depends on the work."""

Run = Callable[[], None]


class Theirs:
    def __init__(self, model: "transformers.MixtralForCausalLM"):
        self.model = model

    @classmethod
    def of_files(cls, directory: Path) -> "Theirs":
        """The checkpoint in `directory`, in float32 on the CPU."""
        return cls(transformers.MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32))

    @classmethod
    def made_up(cls, config: DecoderConfig, device: str, dtype: str) -> "Theirs":
        """Random weights, drawn on the device."""
        sizes = transformers.MixtralConfig(
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
            model = transformers.MixtralForCausalLM(sizes)
        return cls(model.eval())

    def fastest(self, kind: str, *args) -> tuple[str, Run]:
        """Of the forms of the experts the one that is faster at a job ("prefill", "decode" or "train"), and that job.

        A form that cannot do it at all, which torch says in a RuntimeError, is passed over.
        """
        self.model.train(kind == "train")
        jobs = {}
        for name in EXPERTS:
            self.model.set_experts_implementation(name)
            run = getattr(self, kind)(*args)
            try:
                run()
            except RuntimeError as error:
                print(f"transformers' {name} experts cannot {kind}: {error}", file=sys.stderr)
                continue
            jobs[name] = clock(run)
        best = min(jobs, key=jobs.get)
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
            self._wait()

        return run

    def decode(self, rows: int) -> Run:
        ids = torch.full((rows, MAX_MODEL_LEN), 5, device=self.model.device)
        with torch.no_grad():
            past = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

        @torch.no_grad()
        def run() -> None:
            for _ in range(DECODED):
                self.model(input_ids=ids[:, :1], past_key_values=past, use_cache=True)
            past.crop(-DECODED)
            self._wait()

        return run

    def train(self, tokens: np.ndarray) -> Run:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        ids = self._ids(tokens)

        def run() -> None:
            self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self._wait()

        return run

    def _ids(self, tokens: np.ndarray) -> "torch.Tensor":
        return torch.from_numpy(tokens).long().to(self.model.device)

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
