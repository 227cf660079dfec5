"""`train.py --adapters`: adapters to train on, or to merge into the checkpoint that another stage trains."""

import dataclasses

from sphinx_jax.checkpoints import CheckpointSource, adapters
from sphinx_jax.checkpoints.source import Adapters, lora_config
from sphinx_jax.cli.train_options import Options


def with_adapters(
    options: Options, source: CheckpointSource | None
) -> tuple[Options, CheckpointSource | None, Adapters | None]:
    """What --adapters asks for: adapters to train on, and the options with their sizes; or, with a stage that trains
    full parameters, the checkpoint into which they are merged as it is read.
    """
    if source is None or options.adapters is None:
        return options, source, None
    if options.train.stage != "lora":
        return options, adapters.with_adapters(source, options.adapters), None
    given = adapters.read_adapters(options.adapters, source)
    lora = lora_config(given)
    sizes = {"lora_rank": lora.rank, "lora_alpha": lora.alpha, "lora_target_modules": lora.target_modules}
    return dataclasses.replace(options, train=dataclasses.replace(options.train, **sizes)), source, given
