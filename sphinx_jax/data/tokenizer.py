"""Text to token ids and back: SentencePiece with byte fallback, as Llama and Mixtral use it."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece

from sphinx_jax.data.chat_template import ChatTemplate
from sphinx_jax.errors import UserError


class Tokenizer:
    """A SentencePiece model: `bos_id`, `eos_id`, `unk_id` and `vocab_size`, and text in both directions."""

    def __init__(self, model: str | Path | bytes):
        """`model` is the path of a `tokenizer.model`, or its bytes.

        Raises UserError if the file is missing, is not a SentencePiece model, or lacks `<s>` or `</s>`.
        """
        name = "the tokenizer's bytes" if isinstance(model, bytes) else str(model)
        if not isinstance(model, bytes):
            try:
                model = Path(model).read_bytes()
            except OSError as error:
                raise UserError(
                    f"{name}: cannot read the tokenizer ({error.strerror}); copy the checkpoint's tokenizer.model there"
                ) from error
        self.model_bytes = model
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            # An empty file parses as a model without pieces.
            loaded = bool(model) and self._pieces.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"{name}: not a SentencePiece model, or damaged; copy tokenizer.model again") from error
        if not loaded:
            raise UserError(f"{name}: not a SentencePiece model, or damaged; copy tokenizer.model again")
        self.bos_id = self._pieces.bos_id()
        self.eos_id = self._pieces.eos_id()
        self.unk_id = self._pieces.unk_id()
        self.vocab_size = self._pieces.vocab_size()
        self.eos_ids: tuple[int, ...] = (self.eos_id,)
        """The tokens that end an answer; a fine-tune may add its own (`tokenizer_files`)."""
        self.chat_template: ChatTemplate | None = None
        """How a text-only model that was trained with one writes a conversation."""
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{name}: this tokenizer has no <s> or no </s>; use the checkpoint's own tokenizer.model")

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Token ids of a whole text. The tokenizer puts a space before it, as in training."""
        return [self.bos_id] * bos + self._ids(text) + [self.eos_id] * eos

    def chat_tokens(self, messages: Sequence[Mapping[str, str]], prefix: str = "") -> list[int]:
        """Token ids of a conversation as the chat template writes it, with one BOS; messages: {"role", "content"}.

        `prefix` is how the assistant's answer begins: it follows the template's generation prompt directly.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template")
        bos = self.chat_template.special_tokens.get("bos_token")
        text = self.chat_template.render(messages) + prefix
        return self.encode(text.removeprefix(bos) if bos else text, bos=True, eos=False)

    def encode_segment(self, text: str) -> list[int]:
        """Token ids of text that follows other text after a space (which `text` may include or omit)."""
        return self._ids(text.removeprefix(" "))

    def encode_wo_prefix_space(self, text: str) -> list[int]:
        """Token ids of text that follows other text directly, without a space."""
        # A newline is a byte token, which never merges with the text after it.
        newline = self._ids("\n")
        return self._ids("\n" + text)[len(newline) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; `<s>` and `</s>` give nothing, bytes that are not UTF-8 give U+FFFD.

        A model's vocabulary may be larger than its tokenizer's: ids past the last piece decode as <unk>.
        """
        return self._pieces.decode([int(i) if 0 <= i < self.vocab_size else self.unk_id for i in ids])

    def token_name(self, token: int) -> str:
        """What a token is called in its tokenizer's files: "<s>", "▁cat", "<0x0A>"."""
        return self._pieces.id_to_piece(token)

    def token_bytes(self, *, first: bool = False) -> list[bytes]:
        """The UTF-8 bytes that each token adds to decoded text; without a leading space if it is the `first` token."""
        pieces = self._pieces

        def added(token: int) -> bytes:
            piece = pieces.id_to_piece(token)
            if pieces.is_control(token):
                return b""
            if pieces.is_byte(token):
                return bytes([int(piece[1:-1], 16)])
            if pieces.is_unknown(token):
                return pieces.decode([token]).encode()
            return (piece.removeprefix("\u2581") if first else piece).replace("\u2581", " ").encode()

        return [added(token) for token in range(pieces.vocab_size())]

    def _ids(self, text: str) -> list[int]:
        try:
            # As bytes: SentencePiece's own conversion fails on half a surrogate pair with an obscure message.
            return self._pieces.encode(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise UserError(f"the text {text!r:.60} is not valid Unicode at character {error.start}") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, fold_case: bool = False) -> bytes:
    """A `tokenizer.model` trained on `texts`, with the settings of Llama's: BPE, byte fallback, no normalisation.

    With `fold_case`, text is normalised to NFKC and lower case before it is tokenised, so decoding gives lower case.
    The same texts give the same bytes. Has fewer than `vocab_size` pieces where the texts hold few distinct words.
    Raises ValueError if `vocab_size` has no room for the 256 bytes, the three special pieces and the characters.
    """
    model = io.BytesIO()
    # Llama's tokenizer was trained on lines, so a newline there is always the byte piece <0x0A>.
    lines = [line for text in texts for line in text.split("\n") if line]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            normalization_rule_name="nfkc_cf" if fold_case else "identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"cannot train a tokenizer of {vocab_size} pieces: {error}") from error
    return model.getvalue()
