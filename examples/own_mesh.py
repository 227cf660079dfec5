"""Lay a model out on a mesh of one's own, and see what each device holds and that the answer is the same.

    python examples/own_mesh.py CHECKPOINT [PICTURE]

Here the devices are eight simulated ones of the CPU; leave the first line of main out to use real ones.
"""

import sys

import jax

import sharding
import sphinx_jax

QUESTION = "what shape is present?"


def main(checkpoint: str, *picture: str) -> None:
    sharding.simulate_devices(8)
    # Experts over two devices, each expert's hidden dimension over two more; and all weights shared out over
    # the last two, to be gathered when they are used.
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    model = sphinx_jax.load(checkpoint, mesh)
    whole = sphinx_jax.load(checkpoint, sharding.make_mesh(devices=jax.devices()[:1]))

    for name, one in (("own mesh", model), ("one device", whole)):
        held = sharding.bytes_per_device(one.engine.params)
        print(f"{name}: {held / 2**20:.2f} MiB of weights on each device")
    expert = model.engine.params["language"]["layers"][0]["ffn"]["w_in"]
    print(f"experts of the first layer, {expert.shape}: {expert.sharding.spec}")

    for one in (model, whole):
        (answer,) = one.generate([QUESTION], list(picture) or None, max_new_tokens=64)
        print(f"{one.mesh.size} device(s): {answer}")


if __name__ == "__main__":
    main(*sys.argv[1:])
