"""Text to token ids and back for checkpoints with tokenizer.json alone, through the `tokenizers` library."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from sphinx_jax.data.added_tokens import decode_bytes
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError

_PREFIX_SPACE = "\u2581"


class HFTokenizer(Tokenizer):
    """The tokenizer that tokenizer.json describes, with the interface of `Tokenizer`.

    `bos` and `eos` are the texts of those tokens; without BOS (None), none is put before a text.
    Raises UserError if the file is damaged, of a kind whose tokens have no bytes of their own, or lacks EOS.
    """

    def __init__(self, data: bytes, bos: str | None, eos: str | None, name: str = "tokenizer.json"):
        self.model_bytes = data
        self._name = name
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8-sig"))
            described = json.loads(data.decode("utf-8-sig"))
        except (Exception, RecursionError) as error:
            raise UserError(f"{name} is not a tokenizer, or damaged ({error!s:.200}); copy it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._added = {
            token["id"]: token for token in described.get("added_tokens") or [] if isinstance(token.get("id"), int)
        }
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        if self.vocab_size > 1 << 24:
            raise UserError(
                f"{name} has token ids of {self.vocab_size:,} and more; copy the model's own tokenizer.json"
            )
        self._is_byte_level = "ByteLevel" in _kinds(described.get("decoder"))
        if not self._is_byte_level and not _kinds(described.get("decoder")) & {"ByteFallback", "Metaspace", "Replace"}:
            raise UserError(
                f"{name} is neither byte-level BPE nor SentencePiece, and its tokens cannot be joined to text; "
                "copy the model's tokenizer.model next to the weights"
            )
        self.bos_id = self._vocabulary.get(bos, -1) if bos is not None else -1
        self.eos_id = self._vocabulary.get(eos, -1) if eos is not None else -1
        self.unk_id = self._vocabulary.get("<unk>", -1)
        if self.eos_id < 0:
            raise UserError(f"{name} names no end-of-sequence token; copy the model's tokenizer_config.json next to it")
        self.eos_ids, self.chat_template = (self.eos_id,), None
        # Whether a space is put before every text, as SentencePiece does.
        first = self._ids("a")[:1]
        self._adds_prefix = bool(first) and (self._tokenizer.id_to_token(first[0]) or "").startswith(_PREFIX_SPACE)

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Token ids of a whole text."""
        return [self.bos_id] * (bos and self.bos_id >= 0) + self._ids(text) + [self.eos_id] * eos

    def encode_segment(self, text: str) -> list[int]:
        """Token ids of text that follows other text after a space (which `text` may include or omit)."""
        text = text.removeprefix(" ")
        return self._ids(text if self._adds_prefix else " " + text)

    def encode_wo_prefix_space(self, text: str) -> list[int]:
        """Token ids of text that follows other text directly, without a space."""
        return super().encode_wo_prefix_space(text) if self._adds_prefix else self._ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
        return decode_bytes(self.token_bytes(first=True), self.token_bytes(), map(int, ids))

    def token_name(self, token: int) -> str:
        """As `Tokenizer.token_name`."""
        return self._tokenizer.id_to_token(token) or ""

    def token_bytes(self, *, first: bool = False) -> list[bytes]:
        """The UTF-8 bytes that each token adds to decoded text; the text's `first` token loses a leading space."""
        table = [b""] * self.vocab_size
        for piece, token in self._vocabulary.items():
            added = self._added.get(token)
            if added is not None:
                table[token] = b"" if added.get("special") else piece.encode()
            elif self._is_byte_level:
                table[token] = _byte_level(piece)
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                table[token] = bytes([int(piece[3:5], 16)])
            else:
                text = piece.removeprefix(_PREFIX_SPACE) if first and self._adds_prefix else piece
                table[token] = text.replace(_PREFIX_SPACE, " ").encode()
        return table

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the text {text!r:.60} is not valid Unicode at character {error.start}") from error
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _kinds(described: Any) -> set[str]:
    """The types of a component of tokenizer.json and of those inside it."""
    if isinstance(described, list):
        return set().union(*map(_kinds, described))
    if not isinstance(described, Mapping):
        return set()
    return {str(described.get("type"))}.union(*map(_kinds, described.values()))


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(piece: str) -> bytes:
    table = _bytes_of_characters()
    if all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    return piece.encode()
