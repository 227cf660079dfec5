"""The vision mappings against the list of every published tensor, at full size."""

import json
import math
import re
from collections import defaultdict

import jax
import numpy as np
import pytest
from flax import nnx

from sphinx_jax.checkpoints.mapping.vision import is_ignored_vision_name, vision_mappings
from sphinx_jax.config import nano, sphinx_moe
from sphinx_jax.vision.ensemble import Ensemble
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def published() -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by name."""
    shapes = {}
    for line in (GOLDEN / "published_vision_tensors.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, shape = line.split("\t")
        layers = re.search(r"\{(\d+):(\d+):(\d+)\}", name)
        names = [name] if not layers else [name.replace(layers[0], str(i)) for i in range(*map(int, layers.groups()))]
        shapes |= {n: tuple(json.loads(shape)) for n in names}
    return shapes


def test_exactly_the_published_tensors(published):
    mappings = vision_mappings(sphinx_moe().vision, 4096)
    used = {mapping.name: mapping.shape for mapping in mappings}
    assert len(used) == len(mappings)
    ignored = {name: shape for name, shape in published.items() if is_ignored_vision_name(name)}
    assert used | ignored == published
    assert not used.keys() & ignored.keys()

    def count(shapes) -> int:
        return sum(math.prod(shape) for shape in shapes.values())

    assert (len(published), count(published)) == (1986, 3_439_802_497)
    assert (len(ignored), count(ignored)) == (8, 39_383_809)


@pytest.mark.parametrize(("config", "dim"), [(sphinx_moe().vision, 4096), (nano().vision, 96)], ids=["full", "nano"])
def test_every_parameter_element_is_mapped_once(config, dim):
    """Blocks have the shape of their destination, do not overlap, and together fill each parameter."""
    state = nnx.state(nnx.eval_shape(lambda: Ensemble(config, dim, rngs=nnx.Rngs(0))), nnx.Param)
    shapes = {
        ("vision", *(key.key for key in path)): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(state))
    }
    places, elements = defaultdict(set), defaultdict(int)
    for mapping in vision_mappings(config, dim):
        parameter = np.broadcast_to(np.empty(()), shapes[mapping.path])
        assert parameter[mapping.index].shape == mapping.block_shape, mapping
        places[mapping.path].add(str(mapping.index))
        elements[mapping.path] += math.prod(mapping.block_shape)
    assert elements == {path: math.prod(shape) for path, shape in shapes.items()}
    # Equal totals and different places leave no room for an overlap.
    assert sum(map(len, places.values())) == len(vision_mappings(config, dim))
