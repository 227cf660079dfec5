"""train.py with one more preset, a tiny decoder. The tests run it in subprocesses."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from sphinx_jax import config
from sphinx_jax.cli import common, train

TINY = config.SphinxConfig(
    language=config.DecoderConfig(
        dim=16, hidden_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, num_experts=4, vocab_size=512
    ),
    vision=None,
)
config.PRESETS["tiny"] = lambda: TINY

if __name__ == "__main__":
    sys.exit(common.run(train.main, sys.argv[1:]))
