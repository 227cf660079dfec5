"""Will it fit? The programs of inference or training, compiled ahead of time for GPUs that are absent.

Nothing here decides what runs: the programs are the engine's and the trainer's own, given shapes instead of arrays.
docs/memory-planning.md says what a plan counts and what it leaves out.
"""
