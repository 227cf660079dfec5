"""Command lines: `sphinx-jax train | infer | convert`, and the scripts at the root of the repository."""
