"""Logits of a model of transformers, and of ours."""

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from sphinx_jax.model import bind


def reference_logits(model, tokens) -> np.ndarray:
    # Importing this module needs no extra: a test file imports it before it finds out that it has to skip.
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def our_logits(loaded, tokens) -> np.ndarray:
    with sharding.mesh_context(loaded.mesh):
        run = jax.jit(lambda params, tokens: bind(loaded.graph, params)(tokens)[0])
        return np.asarray(run(loaded.params, jnp.asarray(tokens)))
