"""The recipe of a large model on the command line: it fills in the options that were not given, and is printed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sharding import MeshShape
from sphinx_jax.cli.train_options import Options
from sphinx_jax.config import SphinxConfig
from sphinx_jax.memory_plan.mesh_sweep import training_meshes
from sphinx_jax.memory_plan.report import mesh_text
from sphinx_jax.training.recipe import Recipe, microbatches, recipe

SETTINGS = (
    *("stage", "dtype", "remat", "moments", "lr", "min_lr", "warmup_epochs", "warmup_steps", "weight_decay"),
    *("clip_norm", "epochs", "steps", "batch_size", "grad_accum_steps", "max_length"),
)
"""The options that the table shows, besides the mesh."""

LORA_SETTINGS = ("quantize", "lora_rank", "lora_alpha", "lora_target_modules")


def with_recipe(
    options: Options, argv: Sequence[str], config: SphinxConfig, num_devices: Callable[[], int]
) -> tuple[Options, Recipe | None]:
    """The options with the recipe of the model of `config` where `argv` is silent, and the recipe; None and the options
    themselves for a small model.

    Without --mesh options the mesh is the first choice for `num_devices` devices. Raises LayoutError if there is none.
    """
    given = given_options(argv)
    found = recipe(config, options.train.stage if "stage" in given else None)
    if found is None:
        return options, None
    values = _values(found)
    if "steps" in given:
        values["epochs"] = None
    if "warmup_steps" in given:
        values["warmup_epochs"] = None
    chosen = {name: value for name, value in values.items() if name not in given}
    shape = options.mesh if options.mesh != MeshShape() else training_meshes(config, num_devices())[0]
    train_config = _replace(options.train, chosen)
    if "grad_accum_steps" not in given:
        train_config = dataclasses.replace(
            train_config, grad_accum_steps=microbatches(train_config, shape.data * shape.fsdp)
        )
    options = _replace(options, chosen | {"train": train_config, "yaml": _replace(options.yaml, chosen), "mesh": shape})
    return options, found


def given_options(argv: Sequence[str]) -> set[str]:
    """The names of the options in `argv`, as fields of `Options`."""
    return {arg.partition("=")[0].lstrip("-").replace("-", "_") for arg in argv if arg.startswith("--")}


def print_settings(options: Options, argv: Sequence[str], console: Console) -> None:
    """One table: each setting of a run that has a recipe, and whether the recipe or the command line gives it."""
    given = given_options(argv)
    values = {**vars(options), **vars(options.train), **vars(options.yaml)}
    table = Table(title="settings, the original's where none is given", title_justify="left", box=None, pad_edge=False)
    for name in ("setting", "value", "from"):
        table.add_column(name)
    lora = options.train.lora
    values |= {f"lora_{name}": value for name, value in (dataclasses.asdict(lora) if lora else {}).items()}
    for name in (*SETTINGS, *(LORA_SETTINGS if lora else ())):
        replaced = (name == "steps" and options.epochs is not None) or (
            name == "warmup_steps" and options.warmup_epochs is not None
        )
        if values[name] is not None and not replaced:
            source = "given" if name in given else "recipe"
            table.add_row(f"--{name.replace('_', '-')}", _text(values[name]), source)
    is_given = any(name.startswith("mesh.") for name in given)
    table.add_row("--mesh", mesh_text(dataclasses.asdict(options.mesh)), "given" if is_given else "all devices")
    console.print(table)


def _values(found: Recipe) -> dict[str, Any]:
    """The recipe by the names of options: what differs from the defaults of a small model, and the rest of a run."""
    defaults = dataclasses.asdict(type(found.train_config)())
    values = dataclasses.asdict(found.train_config)
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    return changed | {
        "batch_size": found.train_config.batch_size,
        "epochs": found.epochs,
        "warmup_epochs": found.warmup_epochs,
        "max_length": found.max_length,
    }


def _replace(instance: Any, values: dict[str, Any]) -> Any:
    """A dataclass with those of `values` that are its fields."""
    names = {field.name for field in dataclasses.fields(instance)}
    return dataclasses.replace(instance, **{name: value for name, value in values.items() if name in names})


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
