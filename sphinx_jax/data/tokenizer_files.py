"""The tokenizer of a checkpoint, from the files next to its weights: which reader, added tokens, ends of sequence."""

import json
from collections.abc import Mapping
from typing import Any

from sphinx_jax.data.added_tokens import AddedToken, ExtendedTokenizer
from sphinx_jax.data.chat_template import ChatTemplate
from sphinx_jax.data.hf_tokenizer import HFTokenizer
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError

# Multiples to which training programs round a vocabulary up.
_PADDING_MULTIPLES = (1, 8, 16, 32, 64, 128, 256, 512, 1024)


def load_tokenizer(
    files: Mapping[str, bytes],
    vocab_size: int,
    where: str,
    *,
    text_only: bool = False,
    expected_tokens: int | None = None,
) -> Tokenizer:
    """The tokenizer in `files`, file names to contents, of a model with `vocab_size` token ids.

    tokenizer.model with the tokens that the other files add, or else tokenizer.json. `eos_ids` are the tokenizer's
    and those of generation_config.json, or of config.json where that has none. A `text_only` model gets its chat
    template. `expected_tokens`: the size of the model's tokenizer where it is known, padding aside. Raises UserError,
    which names the directory `where`, if there is no tokenizer, a file is damaged, or it is that of another model.
    """
    config = _read(files, "tokenizer_config.json", where)
    special = _special_tokens(config, _read(files, "special_tokens_map.json", where))
    if "tokenizer.model" in files:
        added = _added_tokens(files, config, special, where)
        base = files["tokenizer.model"]
        tokenizer = ExtendedTokenizer(base, added, config.get("legacy") is not False) if added else Tokenizer(base)
    elif "tokenizer.json" in files:
        bos, eos = special.get("bos_token"), special.get("eos_token")
        name = f"{where}/tokenizer.json"
        vocabulary = _names(files["tokenizer.json"])
        bos = bos or ("<s>" if "<s>" in vocabulary else None)
        eos = eos or ("</s>" if "</s>" in vocabulary else None)
        tokenizer = HFTokenizer(files["tokenizer.json"], bos, eos, name)
    else:
        raise UserError(
            f"{where} has no tokenizer: no tokenizer.model or tokenizer.json; copy the model's own next to the weights"
        )
    _check_size(tokenizer, vocab_size, where, expected_tokens)
    tokenizer.eos_ids = _eos_ids(files, tokenizer, vocab_size, where)
    template = _chat_template(files, config) if text_only else None
    if template is not None:
        tokenizer.chat_template = ChatTemplate(template, special, f"the chat template of {where}")
    return tokenizer


def without_chat_template(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The tokenizer's files of a model that is trained with this program's own template, and prompted with it."""
    kept = {name: data for name, data in files.items() if name != "chat_template.jinja"}
    config = _read(files, "tokenizer_config.json", "the checkpoint")
    if "chat_template" in config:
        del config["chat_template"]
        kept["tokenizer_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return kept


def _read(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file. Raises UserError if it holds something else."""
    if name not in files:
        return {}
    try:
        values = json.loads(files[name].decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}/{name} is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}/{name} must hold a JSON object, not {type(values).__name__}; copy it again")
    return values


def _names(tokenizer_json: bytes) -> str:
    return tokenizer_json.decode("utf-8", "replace")


def _special_tokens(*files: Mapping[str, Any]) -> dict[str, str]:
    """The text of bos_token, eos_token and the others, from the first file that has each."""
    tokens: dict[str, str] = {}
    for values in files:
        for key, value in values.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens.setdefault(key, content)
    return tokens


def _added_tokens(
    files: Mapping[str, bytes], config: Mapping[str, Any], special: Mapping[str, str], where: str
) -> list[AddedToken]:
    """The tokens of added_tokens.json, tokenizer_config.json and tokenizer.json, of which the later say more."""
    special_texts = set(special.values())
    more = config.get("additional_special_tokens")
    special_texts |= {token for token in more if isinstance(token, str)} if isinstance(more, list) else set()
    tokens: dict[int, AddedToken] = {}
    try:
        for content, token in _read(files, "added_tokens.json", where).items():
            tokens[int(token)] = AddedToken(content, int(token), content in special_texts)
        detailed = [*(config.get("added_tokens_decoder") or {}).items()]
        added = _read(files, "tokenizer.json", where).get("added_tokens") or []
        detailed += [(token["id"], token) for token in added]
        for token, info in detailed:
            lstrip, rstrip = bool(info.get("lstrip")), bool(info.get("rstrip"))
            content = str(info["content"])
            is_special = bool(info.get("special")) or content in special_texts
            tokens[int(token)] = AddedToken(content, int(token), is_special, lstrip, rstrip)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where} lists added tokens that are none ({error}); copy the tokenizer's files again"
        ) from error
    if any(token < 0 or not added.content for token, added in tokens.items()):
        raise UserError(
            f"{where} lists an added token that is empty or has a negative id; copy the tokenizer's files again"
        )
    return [tokens[token] for token in sorted(tokens)]


def _check_size(tokenizer: Tokenizer, vocab_size: int, where: str, expected_tokens: int | None) -> None:
    """Raises UserError if the tokenizer's tokens are not those of a vocabulary of `vocab_size`."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer of {where} has {tokenizer.vocab_size} tokens and the model only {vocab_size}: copy the one "
            "that came with the model next to the weights"
        )
    padded = {-(-tokenizer.vocab_size // multiple) * multiple for multiple in _PADDING_MULTIPLES}
    if expected_tokens is not None and expected_tokens not in padded:
        raise UserError(
            f"the tokenizer of {where} has {tokenizer.vocab_size} tokens and the model {expected_tokens}: copy all "
            "of the model's own tokenizer files (tokenizer.model or tokenizer.json, added_tokens.json, "
            "tokenizer_config.json) next to the weights"
        )


def _eos_ids(files: Mapping[str, bytes], tokenizer: Tokenizer, vocab_size: int, where: str) -> tuple[int, ...]:
    """The tokenizer's end of sequence and the configs' `eos_token_id`, a number or a list. Raises UserError."""
    ids = [tokenizer.eos_id]
    for name in ("generation_config.json", "hugging_face_config.json"):
        value = _read(files, name, where).get("eos_token_id")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        for token in values:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise UserError(
                    f"{where}: eos_token_id of {name.removeprefix('hugging_face_')} must be token ids below "
                    f"{vocab_size}, not {value!r:.60}; correct it"
                )
            if token >= tokenizer.vocab_size:
                raise UserError(
                    f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, and eos_token_id is {token}: copy all "
                    "of the model's own tokenizer files (added_tokens.json, tokenizer_config.json) next to the weights"
                )
        return tuple(dict.fromkeys(ids + values))
    return tuple(ids)


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    """The template of chat_template.jinja or tokenizer_config.json; of several, the one called default."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8-sig", "replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
