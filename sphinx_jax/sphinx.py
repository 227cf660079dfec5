"""The public face: a loaded model that reads pictures and text and answers."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from PIL import Image

from sphinx_jax import checkpoints
from sphinx_jax.checkpoints.loaded_model import Loaded, Params
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.conversation import DEFAULT_TEMPLATE, Conversation
from sphinx_jax.data.images import open_image, padded_resize, to_rgb
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError
from sphinx_jax.inference.batch_file import Progress, answer_file
from sphinx_jax.inference.chat import Chat
from sphinx_jax.inference.engine import MAX_MODEL_LEN, Engine
from sphinx_jax.inference.layer_offload import OffloadEngine, in_host_memory
from sphinx_jax.inference.requests import Completion, PreparedImage, Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.serving import MAX_NUM_SEQS, Session, answer_all
from sphinx_jax.inference.stop_strings import check_stops
from sphinx_jax.kernels.quantized import GROUP, Kind, Quantized
from sphinx_jax.quantization import quantized

ImageLike = Image.Image | str | Path | np.ndarray | PreparedImage
"""A PIL image, the path of one, pixels uint8[height, width, 3], or float32[size, size, 3] already normalised;
or what `Sphinx.picture` made of one, which saves the scaling when it is used again."""


def load(
    path: str | os.PathLike,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    *,
    max_model_len: int = MAX_MODEL_LEN,
    quantize: Kind | None = None,
    offload: bool = False,
    prepare: Callable[["Sphinx"], None] | None = None,
) -> "Sphinx":
    """The model in a checkpoint directory: a run of `train.py`, LLaMA2-Accessory's format, or Mixtral's.

    `mesh` is what it is laid out on, by default all devices; `dtype` "bfloat16" or "float32", by default as
    stored; `max_model_len` how many positions, the picture included, a prompt and its answer may take; `quantize` "int8" or
    "int4" keeps the decoder's matrices in few bits, each rounded as soon as it is read; `offload` keeps its layers in
    host memory, and on the devices two of them at a time (see `inference.offload`). `prepare` is called with the model
    while its weights are being read, to compile what it will be asked (see `Sphinx.prepare`); with `quantize` or
    `offload` it is not, and all is compiled when it is asked.
    Raises UserError if `path` holds no checkpoint or a damaged one, LayoutError if the mesh does not fit.
    """
    if quantize not in (None, *GROUP):
        raise UserError(f"unknown quantize {quantize!r}; choose one of {', '.join(GROUP)}")

    def keep(path: tuple[str | int, ...], array: jax.Array) -> Any:
        kept = quantized(path, array, quantize) if quantize else array
        return in_host_memory(path, kept) if offload else kept

    prepared: list[Sphinx] = []

    def on_abstract_model(promised: Loaded) -> None:
        prepared.append(Sphinx(promised, max_model_len))
        prepare(prepared[0])

    # Parameters that are kept in another form are not those that are promised.
    as_read = prepare if not (quantize or offload) else None
    loaded = checkpoints.load(
        path, mesh, dtype, unstacked=True, keep=keep, on_abstract_model=as_read and on_abstract_model
    )
    if not prepared:
        return Sphinx(loaded, max_model_len, offload)
    prepared[0].set_params(loaded.params)
    return prepared[0]


class Sphinx:
    """`config`, `tokenizer` and `mesh` of a loaded model, and what it can do."""

    def __init__(self, loaded: Loaded, max_model_len: int = MAX_MODEL_LEN, offload: bool = False):
        if loaded.tokenizer_bytes is None:
            raise UserError("the checkpoint has no tokenizer.model; copy the model's own beside the weights")
        self.config: SphinxConfig = loaded.config
        self.mesh: Mesh = loaded.mesh
        self.tokenizer = Tokenizer(loaded.tokenizer_bytes)
        self._params = loaded.params
        if offload:
            self.engine = OffloadEngine(loaded.config, loaded.params, self.tokenizer, loaded.mesh, max_model_len)
        else:
            self.engine = Engine(loaded.config, loaded.graph, loaded.params, self.tokenizer, loaded.mesh, max_model_len)

    def prepare(self, prompt: str, image: bool, *, max_new_tokens: int = 512, stop: Sequence[str] = ()) -> None:
        """Compile what `stream` takes for this question, with a picture or without one, and run nothing.

        For `prepare` of `load`, when there are no weights yet.
        """
        size = self.config.vision.image_size if image else 0
        picture = PreparedImage.of(np.zeros((size, size, 3), np.float32)) if image else None
        request = self.request(prompt, picture, max_new_tokens=max_new_tokens)
        self.engine.prepare(request, check_stops(self.stops(stop)))

    def set_params(self, params: Params) -> None:
        """The weights that were promised."""
        self._params = self.engine.params = params

    def picture(self, image: ImageLike) -> PreparedImage:
        """An image as the encoders take it. Raises UserError if it cannot be read or has the wrong shape or dtype."""
        if isinstance(image, PreparedImage):
            return image
        if self.config.vision is None:
            raise UserError("this model reads text only; leave the picture out, or load a checkpoint with encoders")
        size = self.config.vision.image_size
        if isinstance(image, str | Path):
            image = open_image(image)
        elif not isinstance(image, Image.Image):
            image = np.asarray(image)
            if image.dtype == np.float32 and image.shape == (size, size, 3):
                return PreparedImage.of(image)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise UserError(
                    f"an image must be a PIL image, a path, uint8[height, width, 3] or float32[{size}, {size}, 3], "
                    f"got {image.dtype}{list(image.shape)}"
                )
            image = Image.fromarray(image)
        return PreparedImage.of(padded_resize(to_rgb(image), size))

    def logits(
        self, tokens: Int[np.ndarray, "batch text"], images: Iterable[ImageLike] | None = None
    ) -> Float[Array, "batch text vocab"]:
        """Scores of the word after each token, teacher-forced, float32. Pictures stand after the first token."""
        pictures = None if images is None else [self.picture(image) for image in images]
        return self.engine.logits(np.asarray(tokens, np.int32), pictures)

    def encode_images(self, images: Iterable[ImageLike]) -> Float[Array, "batch crops tokens dim"]:
        """The pictures as words of the language model, without the start and end vectors."""
        return jnp.stack(self.engine.encode([self.picture(image) for image in images]))

    def generate(
        self,
        prompts: Sequence[str],
        images: Iterable[ImageLike | None] | None = None,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> list[str]:
        """The answer to each question. The options, and more of them, are those of `complete`."""
        completions = self.complete(
            prompts,
            images,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            **options,
        )
        return [completion.text for completion in completions]

    def complete(
        self,
        prompts: Sequence[str],
        images: Iterable[ImageLike | None] | None = None,
        *,
        max_new_tokens: int = 512,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        raw: bool = False,
        max_num_seqs: int = MAX_NUM_SEQS,
        **sampling: float,
    ) -> list[Completion]:
        """Like `generate`, with tokens, their log-probabilities, and why each answer ended.

        `prompts` are questions, put into the conversation template; with `raw` they are taken as they are, and
        nothing but EOS and `stop` ends the answer. `images` gives each prompt its picture, or None.
        `sampling` are the fields of `SamplingParams`: temperature, top_p, top_k, repetition_penalty. An answer depends on
        its own prompt, picture and seed alone; give a list of seeds to draw several for one prompt. At most `max_num_seqs`
        are answered at a time.
        Raises UserError on a prompt that does not fit the context, or an option outside its range.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list of texts, got the text {prompts!r:.60}; write [prompt]")
        prompts = list(prompts)
        images = [None] * len(prompts) if images is None else list(images)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        for name, values in (("images", images), ("seeds", seeds)):
            if len(values) != len(prompts):
                raise UserError(f"{len(prompts)} prompts but {len(values)} {name}; give one for each prompt")
        requests = (
            self.request(prompt, image, max_new_tokens=max_new_tokens, seed=number, raw=raw)
            for prompt, image, number in zip(prompts, images, seeds, strict=True)
        )
        return answer_all(self.engine, requests, SamplingParams(**sampling), self.stops(stop, raw), max_num_seqs)

    def stream(
        self,
        prompt: str,
        image: ImageLike | None = None,
        *,
        max_new_tokens: int = 512,
        seed: int = 0,
        stop: Sequence[str] = (),
        raw: bool = False,
        **sampling: float,
    ) -> Iterator[str]:
        """The text that `generate` gives, piece by piece as it comes."""
        request = self.request(prompt, image, max_new_tokens=max_new_tokens, seed=seed, raw=raw)
        session = Session(self.engine, self.engine.cache_len_needed(request))
        return session.stream(request, SamplingParams(**sampling), self.stops(stop, raw))

    def chat(
        self,
        image: ImageLike | None = None,
        *,
        max_new_tokens: int = 512,
        seed: int = 0,
        stop: Sequence[str] = (),
        **sampling: float,
    ) -> Chat:
        """A conversation about a picture, or none, that remembers its turns."""
        return Chat(
            self.engine,
            None if image is None else self.picture(image),
            max_new_tokens=max_new_tokens,
            sampling=SamplingParams(**sampling),
            seed=seed,
            stop=tuple(stop),
        )

    def answer_file(
        self,
        source: str | os.PathLike,
        out: str | os.PathLike,
        *,
        max_new_tokens: int = 512,
        seed: int = 0,
        stop: Sequence[str] = (),
        max_num_seqs: int = MAX_NUM_SEQS,
        logprobs: bool = False,
        **sampling: float,
    ) -> Iterator[Progress]:
        """Answer a file of questions, line by line as `inference.batch` describes; goes on where it was stopped."""
        return answer_file(
            self.engine,
            Path(source),
            Path(out),
            self.picture,
            lambda prompt, picture: self.request(prompt, picture, max_new_tokens=max_new_tokens, seed=seed),
            sampling=SamplingParams(**sampling),
            stops=self.stops(stop),
            max_num_seqs=max_num_seqs,
            logprobs=logprobs,
        )

    def save(
        self,
        path: str | os.PathLike,
        format: Literal["native", "accessory", "mixtral"] = "native",
        shards: int | None = None,
    ) -> None:
        """Write the model to the directory `path`, which must not exist yet; `shards` files if the format has them.

        Raises UserError if it does, or the format cannot hold the model, or the model is quantized.
        """
        is_quantized = lambda x: isinstance(x, Quantized)
        if any(map(is_quantized, jax.tree.leaves(self._params, is_leaf=is_quantized))):
            raise UserError("a quantized model cannot be saved, its weights are rounded; load it without quantize")
        checkpoints.save(path, self.config, self._params, self.tokenizer.model_bytes, format, shards)

    def request(
        self,
        prompt: str,
        image: ImageLike | None = None,
        *,
        max_new_tokens: int = 512,
        seed: int = 0,
        raw: bool = False,
    ) -> Request:
        """One prompt as the engine takes it."""
        if raw:
            tokens = self.tokenizer.encode(prompt, bos=True, eos=False)
        else:
            tokens = Conversation.from_pairs([(prompt, None)]).prompt_tokens(self.tokenizer)
        return Request(tokens, None if image is None else self.picture(image), max_new_tokens, seed)

    def stops(self, stop: Sequence[str], raw: bool = False) -> tuple[str, ...]:
        """The stop strings given, and the one that ends every answer of the template."""
        if isinstance(stop, str):
            raise UserError(f"stop must be a list of texts, got the text {stop!r}; write [{stop!r}]")
        return tuple(stop) if raw else (DEFAULT_TEMPLATE.response_end_signal, *stop)
