"""Shard a model over a mesh of one's own: print what each device holds, and that the answer is the same.

    python examples/own_mesh.py CHECKPOINT [IMAGE]

Here the devices are eight simulated ones of the CPU; leave the first line of main out to use real ones.
"""

import sys

import jax

import sharding
import sphinx_jax

QUESTION = "what shape is present?"


def main(checkpoint: str, *image: str) -> None:
    sharding.simulate_devices(8)
    # Experts over two devices, each expert's hidden dimension over two more; and all parameters sharded over the last
    # two, all-gathered for use.
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    model = sphinx_jax.load(checkpoint, mesh)
    single = sphinx_jax.load(checkpoint, sharding.make_mesh(devices=jax.devices()[:1]))

    for name, one in (("own mesh", model), ("one device", single)):
        held = sharding.bytes_per_device(one.engine.params)
        print(f"{name}: {held / 2**20:.2f} MiB of parameters on each device")
    expert = model.engine.params["language"]["layers"][0]["ffn"]["w_in"]
    print(f"experts of the first layer, {expert.shape}: {expert.sharding.spec}")

    for one in (model, single):
        (answer,) = one.generate([QUESTION], list(image) or None, max_new_tokens=64)
        print(f"{one.mesh.size} device(s): {answer}")


if __name__ == "__main__":
    main(*sys.argv[1:])
