"""Tokens that a fine-tune added to its SentencePiece model: ChatML's `<|im_start|>` and the like."""

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError

_SPACES = r"\s*"


class AddedToken(NamedTuple):
    """A token beside the tokenizer's pieces, found in text before these. A special one decodes to nothing.

    `lstrip` and `rstrip`: the whitespace before or after it in the text belongs to it.
    """

    content: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False


def decode_bytes(first: Sequence[bytes], rest: Sequence[bytes], ids: Iterable[int]) -> str:
    """Text of token ids: the bytes of the first token that has any from `first`, of the others from `rest`."""
    parts: list[bytes] = []
    for token in ids:
        if 0 <= token < len(rest) and rest[token]:
            parts.append((rest if parts else first)[token])
    return b"".join(parts).decode("utf-8", "sphinx_jax.replace_byte")


def _replace_byte(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for each byte that is not UTF-8, as SentencePiece decodes."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("sphinx_jax.replace_byte", _replace_byte)


class ExtendedTokenizer(Tokenizer):
    """A SentencePiece model and added tokens.

    `legacy`, of the tokenizer's config: the text after an added token begins with the prefix space, as every text does.
    Raises UserError if an added token has the id of another piece, or the ids leave a gap larger than the vocabulary.
    """

    def __init__(self, model: bytes, added: Sequence[AddedToken], legacy: bool = True):
        super().__init__(model)
        pieces = self.vocab_size
        self._added = {token.id: token for token in added if token.id >= pieces}
        for token in added:
            if token.id < pieces and self._pieces.id_to_piece(token.id) != token.content:
                raise UserError(
                    f"the added token {token.content!r:.60} has the id {token.id} of another piece of tokenizer.model; "
                    "copy the tokenizer's files again, all from one model"
                )
        self._legacy = legacy
        self.vocab_size = max([pieces - 1, *self._added]) + 1
        by_content = {token.content: token for token in self._added.values()}
        self._by_content = by_content
        # The longest first: one added token may begin with another.
        patterns = [
            _SPACES * token.lstrip + f"({re.escape(content)})" + _SPACES * token.rstrip
            for content, token in sorted(by_content.items(), key=lambda item: -len(item[0]))
        ]
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def _ids(self, text: str) -> list[int]:
        if self._pattern is None:
            return super()._ids(text)
        ids: list[int] = []
        end = 0
        for match in self._pattern.finditer(text):
            ids += self._text_ids(text[end : match.start()], follows_added=end > 0)
            ids.append(self._by_content[match[match.lastindex or 0]].id)
            end = match.end()
        return ids + self._text_ids(text[end:], follows_added=end > 0)

    def _text_ids(self, text: str, follows_added: bool) -> list[int]:
        if not text:
            return []
        if not follows_added or self._legacy:
            return super()._ids(text)
        newline = super()._ids("\n")
        return super()._ids("\n" + text)[len(newline) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
        return decode_bytes(self.token_bytes(first=True), self.token_bytes(), map(int, ids))

    def token_bytes(self, *, first: bool = False) -> list[bytes]:
        """The UTF-8 bytes that each token adds to decoded text; the text's `first` token loses a leading space."""
        pieces = self._pieces.vocab_size()
        table = super().token_bytes(first=first)[:pieces]
        added = (self._added.get(token) for token in range(pieces, self.vocab_size))
        return table + [b"" if token is None or token.special else token.content.encode() for token in added]
