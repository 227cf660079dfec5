"""Planted faults: what the tests check of annotations fails where it should."""

from dataclasses import dataclass

import jax.numpy as jnp
import jaxtyping
import pytest
from jaxtyping import Array, Float

from sphinx_jax.hardware import find_gpu
from sphinx_jax.kernels.depthwise import depthwise_conv
from tests.type_checker import check

decorate = jaxtyping.jaxtyped(typechecker=check)

Vector = Float[Array, " n"]


@decorate
def scaled(x: Vector | None, weights: "Float[Array, 'n k']") -> tuple[Vector, int]:
    return (weights[:, 0] if x is None else x * weights.sum(axis=1)), x


@decorate
def doubled(count: int) -> int:
    return str(count) if count > 10 else 2 * count


@decorate
@dataclass
class Batch:
    images: Float[Array, "batch height"]
    labels: Float[Array, " batch"]


def refused(call, *args):
    """The message of the error that a call's annotations raise."""
    with pytest.raises(TypeError, match=r"hint|[Tt]ype-check") as error:
        call(*args)
    return str(error.value)


def test_sizes_of_dimensions():
    assert "x" in refused(scaled, jnp.ones(3), jnp.ones((4, 2)))
    assert "labels" in refused(Batch, jnp.ones((2, 3)), jnp.ones(3))
    Batch(jnp.ones((2, 3)), jnp.ones(2))


def test_number_of_dimensions_and_type():
    refused(scaled, jnp.ones((3, 3)), jnp.ones((3, 2)))
    refused(scaled, jnp.ones(3, int), jnp.ones((3, 2)))


def test_results():
    refused(scaled, None, jnp.ones((3, 2)))
    refused(doubled, 11)
    assert doubled(2) == 4


def test_functions_without_arrays():
    refused(doubled, "2")
    refused(find_gpu, 80)


def test_functions_of_the_package():
    refused(depthwise_conv, jnp.ones((2, 4, 4)), jnp.ones((3, 3, 4)))
    refused(depthwise_conv, jnp.ones((2, 4, 4, 5)), jnp.ones((3, 3, 4)))
