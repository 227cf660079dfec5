"""Will it fit? The programs of inference or training, compiled for GPUs that are not there.

Nothing here decides what runs: the programs are the engine's and the training loop's own, given shapes instead of
arrays. docs/planning.md says what a plan counts and what it leaves out.
"""

from sphinx_jax.planning.command import plan_inference, plan_training
from sphinx_jax.planning.inference import inference_plan
from sphinx_jax.planning.training import shapes_of, training_batch, training_plan

__all__ = [
    "inference_plan",
    "plan_inference",
    "plan_training",
    "shapes_of",
    "training_batch",
    "training_plan",
]
