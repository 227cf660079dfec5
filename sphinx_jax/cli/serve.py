"""Serve a model: an OpenAI-compatible API, and a page in the browser.

Examples:
  python serve.py                                       the newest run, on http://127.0.0.1:8000
  python serve.py --checkpoint SPHINX-MoE --mesh.tensor 8 --api-key-file key.txt --host 0.0.0.0
  python serve.py --checkpoint SPHINX-MoE --quantize int4 --max-num-seqs 16 --max-model-len 2048
  python serve.py --plan --gpu a100-80gb --num-gpus 2   would it fit? needs no GPU and no weights

  curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"messages": [{"role": "user", "content": "Hello"}]}'

The server listens at once; /health says when it is ready, and so does the last line of standard output.
"""

import functools
import logging
import signal
import socket
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import sharding
from sphinx_jax import Sphinx, UserError, checkpoints
from sphinx_jax.checkpoints.loaded_model import model_mesh
from sphinx_jax.cli import common
from sphinx_jax.cli.model_options import chosen_checkpoint, chosen_mesh, load_model, plan, start_process
from sphinx_jax.cli.serve_options import Options, check_options, settings
from sphinx_jax.inference import generate, warmup
from sphinx_jax.inference.bucketing import SERVER_CHUNKS
from sphinx_jax.inference.capacity import check_cache_fits, num_seqs
from sphinx_jax.inference.lockstep import Lockstep, connect, follow
from sphinx_jax.inference.prompt_logprobs import padded_lens
from sphinx_jax.inference.scheduler import Scheduler
from sphinx_jax.server.settings import Settings

try:
    from sphinx_jax.server.bridge import Served
    from sphinx_jax.server.run import run_server
except ImportError as missing:
    raise UserError(
        f"the server needs a package that is missing ({missing.name}): pip install 'sphinx-jax[serve]'"
    ) from missing


BACKLOG = 512
"""Connections that the kernel holds until they are accepted."""


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code."""
    options = common.parse(Options, argv, "serve.py", __doc__ or "")
    check_options(options)
    if options.planning.plan:
        return plan(options, options.max_num_seqs)
    start_process(options)
    if not sharding.is_primary_process():
        # Of a signal to all of them, the others hear from process 0, once it has answered what was asked.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    listeners: list[socket.socket] = []

    def prepare() -> Settings:
        chosen = settings(options)
        listeners.append(listen(options))
        return chosen

    # Whatever is wrong with these is known before the weights are read.
    chosen = sharding.broadcast_from_primary(prepare)
    if not sharding.is_primary_process():
        model, scheduler, leader = load(options, lambda progress: None)
        follow(model.engine, scheduler, leader[0])
        return 0
    start_log()

    def load_served(report: Callable[[str], None]) -> Served:
        model, scheduler, followers = load(options, report)
        return Served(model, Lockstep(model.engine, scheduler, followers))

    return run_server(listeners[0], chosen, load_served)


def start_log() -> None:
    """What the server does, on standard error: a line a request, nothing of what is said."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    own = logging.getLogger("sphinx_jax.server")
    own.setLevel(logging.INFO)
    own.addHandler(handler)
    own.propagate = False
    # Damaged images: who sends them is told.
    warnings.filterwarnings("ignore", module="PIL")


def listen(options: Options) -> socket.socket:
    """A socket that listens at --host and --port. Raises UserError if it cannot."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
        # Now, not when the event loop runs: two servers may bind one port, and only one may listen.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen at {options.host}:{options.port} ({error.strerror or error}); choose another --port"
        ) from error
    return listener


def check_memory(options: Options) -> None:
    """Raises UserError, before the weights are read, on a KV cache that no device has memory for."""
    source = checkpoints.open(chosen_checkpoint(options))
    mesh = chosen_mesh(options) or model_mesh(source.config)
    sequences = 1 if options.max_num_seqs == "auto" else options.max_num_seqs
    check_cache_fits(source.config.language, mesh, options.dtype or source.dtype, sequences, options.max_model_len)


def load(options: Options, report: Callable[[str], None]) -> tuple[Sphinx, Scheduler, list[Connection]]:
    """The model, a scheduler whose programs are all compiled, and the connections to the other processes."""
    check_memory(options)
    report("reading the weights")
    model = load_model(options, adapters=options.named_adapters, refuse_forged_turns=options.refuse_forged_turns)
    engine = model.engine
    cache_len = engine.cache_len_of_all(SERVER_CHUNKS.lengths)
    shape_of = functools.partial(generate.state_shape, engine, cache_len=cache_len, prefix_bytes=options.prefix_bytes)
    shape = shape_of(num_seqs(engine, options.max_num_seqs, shape_of, SERVER_CHUNKS))
    scheduler = Scheduler(engine, shape, SERVER_CHUNKS)
    warmup.compile_all(
        engine, shape, SERVER_CHUNKS, lambda done, total: report(f"compiling, {done} of {total} programs are done")
    )
    # Now: a request that found no memory would end the server.
    scheduler.allocate()
    if not options.offload:
        for length in padded_lens(options.max_model_len - 1):
            report(f"compiling log-probabilities of {length} tokens")
            engine.prompt_logprobs([0] * length)
    host = (options.processes.coordinator or "").rpartition(":")[0].strip("[]") or None
    return model, scheduler, connect(host)
