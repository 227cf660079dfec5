"""Memory planning: inference and training programs, compiled ahead of time (AOT) for GPUs that are absent.

The programs are the engine's and the trainer's own, traced with abstract arguments (ShapeDtypeStructs), so a plan
describes what runs. docs/memory-planning.md lists what a plan counts and what it leaves out.
"""
