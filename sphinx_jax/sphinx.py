"""The public face: a loaded model that takes images and text and answers."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from PIL import Image

from sphinx_jax import checkpoints
from sphinx_jax.checkpoints.adapters import read_adapters
from sphinx_jax.checkpoints.loaded_model import Loaded, Params, model_mesh
from sphinx_jax.checkpoints.source import Adapters
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.conversation import Conversation
from sphinx_jax.data.images import load_image, padded_resize
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.data.tokenizer_files import load_tokenizer
from sphinx_jax.errors import UserError
from sphinx_jax.inference import generate, pinned_memory
from sphinx_jax.inference.adapters import join_adapters, rank_masks
from sphinx_jax.inference.batch_file import Progress, answer_file
from sphinx_jax.inference.capacity import NumSeqs
from sphinx_jax.inference.chat import Chat
from sphinx_jax.inference.engine import MAX_MODEL_LEN, Engine
from sphinx_jax.inference.generate import MAX_NUM_SEQS
from sphinx_jax.inference.offload_engine import OffloadEngine
from sphinx_jax.inference.offload_params import offloaded
from sphinx_jax.inference.requests import Completion, PreparedImage, Request
from sphinx_jax.inference.sampling import GREEDY, SamplingParams
from sphinx_jax.kernels.quantized import GROUP_SIZE, QuantizedDtype, Weight
from sphinx_jax.lora_params import split
from sphinx_jax.quantization import quantized, quantized_dtype

ImageLike = Image.Image | str | Path | np.ndarray | PreparedImage
"""A PIL image, the path of one, pixels uint8[height, width, 3], or float32[size, size, 3] already normalised;
or what `Sphinx.prepare_image` made of one, which saves the resizing when it is used again."""


def load(
    path: str | os.PathLike,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    *,
    max_model_len: int = MAX_MODEL_LEN,
    quantize: QuantizedDtype | None = None,
    offload: bool = False,
    adapters: Mapping[str, str | os.PathLike] | None = None,
    refuse_forged_turns: bool = False,
    compile_for: Callable[["Sphinx"], None] | None = None,
) -> "Sphinx":
    """The model in a checkpoint directory: a run of `train.py`, LLaMA2-Accessory's format, or Mixtral's.

    `mesh` is what it is sharded over, by default all devices; `dtype` "bfloat16" or "float32", by default as stored;
    `max_model_len` how many positions a prompt, its image and its answer may take; `quantize` "int8" or "int4" keeps
    the decoder's matrices quantized (weight-only), each as soon as it is read; `offload` keeps its experts in host
    memory, and those used last on the devices as far as these have room (`inference.offload_engine`).
    `adapters` are directories of adapters by a name, LoRA runs or PEFT's, of which each request chooses one or none.
    `refuse_forged_turns` refuses questions that hold the end mark of a turn, with which a user could write turns of the
    assistant. `compile_for` is called with the model while its weights are being read, to compile what will run
    (`Sphinx.compile_for`); with `quantize`, `offload` or `adapters` it is not called, and programs are compiled when
    they are first needed.
    Raises UserError if `path` holds no checkpoint or a damaged one, if adapters do not fit it, or if the host has too
    little memory for `offload`; LayoutError if the mesh does not fit.
    """
    if quantize not in (None, *GROUP_SIZE):
        raise UserError(f"unknown quantize {quantize!r}; choose one of {', '.join(GROUP_SIZE)}")

    source = checkpoints.open(path)
    if source.quantized and quantize not in (None, source.quantized):
        raise UserError(
            f"{path} is quantized to {source.quantized}; leave --quantize out, or load the checkpoint that it was "
            "converted from"
        )

    own_adapters = {name: read_adapters(Path(directory), source) for name, directory in (adapters or {}).items()}
    if offload and own_adapters:
        raise UserError("adapters do not go with offload yet: merge them with sphinx-jax convert, or leave one out")

    def transform(path: tuple[str | int, ...], param: Weight) -> Any:
        return (offloaded if offload else quantized)(path, param, quantize)

    abstract: list[Sphinx] = []

    def on_abstract_model(loaded: Loaded) -> None:
        abstract.append(Sphinx(loaded, max_model_len))
        if compile_for is not None:
            compile_for(abstract[0])

    # Transformed parameters are not what the programs of the abstract model are compiled for.
    is_transformed = offload or bool(own_adapters) or source.quantized != quantize is not None
    callback = on_abstract_model if compile_for and not is_transformed else None
    check_tokenizer(source)
    if offload:
        mesh = mesh or model_mesh(source.config)
        pinned_memory.check(source.config, mesh, dtype or source.dtype, quantize or source.quantized)
    loaded = checkpoints.load(source, mesh, dtype, unstacked=True, transform=transform, on_abstract_model=callback)
    if abstract:
        model = abstract[0]
        model.set_params(loaded.params)
    else:
        model = Sphinx(loaded, max_model_len, offload, own_adapters)
    model.path = Path(path).resolve()
    model.adapter_paths = {name: Path(directory) for name, directory in (adapters or {}).items()}
    model.engine.refuses_forged_turns = refuse_forged_turns
    return model


class Sphinx:
    """`config`, `tokenizer` and `mesh` of a loaded model, and what it can do."""

    def __init__(
        self,
        loaded: Loaded,
        max_model_len: int = MAX_MODEL_LEN,
        offload: bool = False,
        adapters: Mapping[str, Adapters] | None = None,
    ):
        self.config: SphinxConfig = loaded.config
        self.mesh: Mesh = loaded.mesh
        self.tokenizer = tokenizer_of(loaded)
        self._assets = assets_of(loaded)
        self.path: Path | None = None
        """The checkpoint that it was loaded from."""
        self.adapter_paths: dict[str, Path] = {}
        """The directories of its adapters by name."""
        if offload:
            self.engine = OffloadEngine(loaded.config, loaded.params, self.tokenizer, loaded.mesh, max_model_len)
            return
        graph, params, masks = loaded.graph, loaded.params, None
        if adapters:
            graph, params = join_adapters(loaded, adapters)
            masks = rank_masks(adapters)
        self.engine = Engine(loaded.config, graph, params, self.tokenizer, loaded.mesh, max_model_len, masks)

    def compile_for(self, prompt: str, has_image: bool, *, max_new_tokens: int = 512) -> None:
        """Compile what `stream` takes for this prompt, with an image or without one, and run nothing.

        For `compile_for` of `load`, when there are no weights yet.
        """
        size = self.config.vision.image_size if has_image and self.config.vision else 0
        image = PreparedImage.of(np.zeros((size, size, 3), np.float32)) if has_image else None
        params = SamplingParams(max_new_tokens=max_new_tokens)
        generate.compile_alone(self.engine, self.request(prompt, image, params))

    def set_params(self, params: Params) -> None:
        """The weights of a model that was abstract."""
        self.engine.params = params

    @property
    def _params(self) -> Params:
        """Of the base, without adapters."""
        return split(self.engine.all_params)[0]

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that requests may choose."""
        return tuple(self.engine.adapters)

    def prepare_image(self, image: ImageLike) -> PreparedImage:
        """An image as the encoders take it. Raises UserError if it cannot be read or has the wrong shape or dtype."""
        if isinstance(image, PreparedImage):
            return image
        if self.config.vision is None:
            raise UserError("this model takes text only; leave the image out, or load a checkpoint with encoders")
        size = self.config.vision.image_size
        if not isinstance(image, str | Path | Image.Image):
            image = np.asarray(image)
            if image.dtype == np.float32 and image.shape == (size, size, 3):
                return PreparedImage.of(image)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise UserError(
                    f"an image must be a PIL image, a path, uint8[height, width, 3] or float32[{size}, {size}, 3], "
                    f"got {image.dtype}{list(image.shape)}"
                )
            image = Image.fromarray(image)
        return PreparedImage.of(padded_resize(load_image(image), size))

    def logits(
        self,
        tokens: Int[np.ndarray, "batch text"],
        images: Iterable[ImageLike] | None = None,
        *,
        adapter: str | None = None,
    ) -> Float[Array, "batch text vocab"]:
        """Logits of the token after each token, teacher-forced, float32. Images are inserted after the first token."""
        prepared = None if images is None else [self.prepare_image(image) for image in images]
        logits = self.engine.logits(np.asarray(tokens, np.int32), prepared, adapter)
        # A table padded for meshes has logits that belong to no token.
        return logits[..., : self.config.language.vocab_size]

    def encode_images(self, images: Iterable[ImageLike]) -> Float[Array, "batch crops tokens dim"]:
        """The image embeddings, before the start and end vectors."""
        return jnp.stack(self.engine.encode([self.prepare_image(image) for image in images]))

    def generate(
        self,
        prompts: Sequence[str],
        images: Iterable[ImageLike | None] | None = None,
        params: SamplingParams = GREEDY,
        *,
        seed: int | Sequence[int] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        **options: Any,
    ) -> list[str]:
        """The answer to each prompt. The arguments are those of `complete`."""
        completions = self.complete(prompts, images, params, seed=seed, adapter=adapter, **options)
        return [completion.text for completion in completions]

    def complete(
        self,
        prompts: Sequence[str],
        images: Iterable[ImageLike | None] | None = None,
        params: SamplingParams = GREEDY,
        *,
        seed: int | Sequence[int] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        raw: bool = False,
        max_num_seqs: NumSeqs = MAX_NUM_SEQS,
        **options: Any,
    ) -> list[Completion]:
        """Like `generate`, with tokens, their log-probabilities, and why each answer ended.

        `prompts` are questions, put into the conversation template; with `raw` they are taken as they are, and nothing
        but EOS and stop strings ends the answer. `images` gives each prompt its image, or None. `options` are fields of
        `SamplingParams`, which replace those of `params`: `max_new_tokens`, `temperature`, `top_p`, `stop`, ... An
        answer depends on its own prompt, image and seed alone; give a list of seeds to draw several for one prompt.
        `adapter` is the name of a loaded adapter, or a list with one, or None for the base, for each prompt. At
        most `max_num_seqs` sequences run at a time; "auto": as many as the devices have memory for.
        Raises UserError on a prompt that does not fit, or an option outside its range.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list of texts, got the text {prompts!r:.60}; write [prompt]")
        if isinstance(images, str | Path | Image.Image | PreparedImage):
            raise UserError("images must be a list with one image, or None, for each prompt; write [image]")
        prompts = list(prompts)
        images = [None] * len(prompts) if images is None else list(images)
        params = sampling_params(params, options)
        seeds = [params.seed if seed is None else seed] * len(prompts) if not isinstance(seed, Sequence) else list(seed)
        adapters = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        for name, values in (("images", images), ("seeds", seeds), ("adapters", adapters)):
            if len(values) != len(prompts):
                raise UserError(f"{len(prompts)} prompts but {len(values)} {name}; give one for each prompt")
        requests = (
            self.request(prompt, image, dataclasses.replace(params, seed=own_seed), raw=raw, adapter=own_adapter)
            for prompt, image, own_seed, own_adapter in zip(prompts, images, seeds, adapters, strict=True)
        )
        return generate.run_all(self.engine, requests, max_num_seqs)

    def stream(
        self,
        prompt: str,
        image: ImageLike | None = None,
        params: SamplingParams = GREEDY,
        *,
        raw: bool = False,
        adapter: str | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """The text that `generate` gives, as it becomes certain."""
        request = self.request(prompt, image, sampling_params(params, options), raw=raw, adapter=adapter)
        return generate.stream_alone(self.engine, request)

    def chat(
        self,
        image: ImageLike | None = None,
        params: SamplingParams = GREEDY,
        *,
        adapter: str | None = None,
        **options: Any,
    ) -> Chat:
        """A conversation about an image, or none, that remembers its turns."""
        prepared = None if image is None else self.prepare_image(image)
        return Chat(self.engine, prepared, sampling_params(params, options), adapter)

    def answer_file(
        self,
        source: str | os.PathLike,
        out: str | os.PathLike,
        params: SamplingParams = GREEDY,
        *,
        max_num_seqs: NumSeqs = MAX_NUM_SEQS,
        logprobs: bool = False,
        prefix_bytes: int | None = None,
        adapter: str | None = None,
        **options: Any,
    ) -> Iterator[Progress]:
        """Answer a file of questions, line by line as `inference.batch_file` describes; resumes where it was stopped.

        `prefix_bytes` bounds the pool of prefixes on each device: 0 turns prefix reuse off. `adapter` answers the
        questions that name no model.
        """
        params = sampling_params(params, options)
        settings = self.settings() | dataclasses.asdict(params)
        if self.adapters:
            digests = {name: checkpoints.digest(path) for name, path in self.adapter_paths.items()}
            settings |= {"adapters": digests, "adapter": adapter}
        return answer_file(
            self.engine,
            Path(source),
            Path(out),
            self.prepare_image,
            lambda prompt, image, model: self.request(prompt, image, params, adapter=self._adapter_of(model, adapter)),
            settings=settings,
            max_num_seqs=max_num_seqs,
            logprobs=logprobs,
            prefix_bytes=prefix_bytes,
        )

    def _adapter_of(self, model: str | None, default: str | None) -> str | None:
        """The adapter of a question that names `model`; the base has the name of its directory. Without adapters,
        names are passed over."""
        if model is None or not self.adapters:
            return default
        is_base = self.path is not None and model == self.path.name and model not in self.adapters
        return None if is_base else model

    def settings(self) -> dict[str, Any]:
        """What decides answers besides the prompt and its sampling."""
        return {
            "checkpoint": None if self.path is None else str(self.path),
            "checkpoint_digest": None if self.path is None else checkpoints.digest(self.path),
            "dtype": str(self._params["language"]["embedding"]["table"].dtype),
            "quantize": quantized_dtype(self._params),
            "max_model_len": self.engine.max_model_len,
        }

    def save(
        self,
        path: str | os.PathLike,
        format: Literal["native", "accessory", "mixtral"] = "native",
        shards: int | None = None,
    ) -> None:
        """Write the model to the directory `path`, which must not exist yet; `shards` files if the format has them.

        Raises UserError if it does, or the format cannot hold the model: of a quantized one only `native` can, and of
        an offloaded one none.
        """
        if isinstance(self.engine, OffloadEngine):
            raise UserError("a model loaded with offload cannot be saved; convert its checkpoint, or load it without")
        checkpoints.save(path, self.config, self._params, self._assets, format, shards)

    def request(
        self,
        prompt: str,
        image: ImageLike | None = None,
        params: SamplingParams = GREEDY,
        *,
        raw: bool = False,
        prefix: str = "",
        adapter: str | None = None,
    ) -> Request:
        """One prompt as the scheduler takes it. The answer continues `prefix`, which is no part of its text."""
        self.engine.rank_masks([adapter])  # raises UserError on an unknown one
        if raw:
            tokens = self.tokenizer.encode(prompt + prefix, bos=True, eos=False)
        else:
            conversation = Conversation.from_pairs([(prompt, None)])
            if self.engine.refuses_forged_turns:
                conversation.check_forged_turns()
            tokens = conversation.prompt_tokens(self.tokenizer, prefix)
        # A chat template has no end signal: its answers end with a token.
        raw = raw or self.tokenizer.chat_template is not None
        prepared = None if image is None else self.prepare_image(image)
        return Request(tokens, prepared, params, raw, continues=bool(prefix), adapter=adapter)


def assets_of(loaded: Loaded) -> dict[str, bytes]:
    """The files of the model's tokenizer by name."""
    own = {} if loaded.tokenizer_bytes is None else {"tokenizer.model": loaded.tokenizer_bytes}
    return own | dict(loaded.assets)


def tokenizer_of(loaded: Loaded) -> Tokenizer:
    """The model's tokenizer. Raises UserError if it has none, or that of another model."""
    return load_tokenizer(
        assets_of(loaded),
        loaded.config.language.vocab_size,
        loaded.where,
        text_only=loaded.config.vision is None,
        expected_tokens=loaded.expected_tokens,
    )


def check_tokenizer(source: checkpoints.CheckpointSource) -> None:
    """Raises UserError, before any weight is read, if the checkpoint has no tokenizer or that of another model."""
    load_tokenizer(
        source.assets, source.config.language.vocab_size, str(source.path), expected_tokens=source.expected_tokens
    )


def sampling_params(params: SamplingParams, options: dict[str, Any]) -> SamplingParams:
    """`params` with the fields in `options` replaced. Raises UserError on a name that is no field."""
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown := sorted(options.keys() - names):
        raise UserError(f"unknown option {unknown[0]!r}; choose from {', '.join(sorted(names))}")
    return dataclasses.replace(params, **options)
