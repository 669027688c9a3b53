"""``awq-jax serve``: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from awq_jax.cli import common
from awq_jax.errors import ConfigError, MissingPackageError, install

_EXAMPLES = """
awq-jax serve ./model-awq
awq-jax serve ./model-awq --adapter sql=./sql-lora --adapter chat=./chat-lora   # "model": "sql" in a request
awq-jax serve ./model-awq --max-slots 32 --max-length 4096 --kv-bits 8
AWQ_JAX_API_KEY=secret awq-jax serve ./model-awq --host 0.0.0.0 --port 80 --name my-model
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python app.py   # any client of the OpenAI API
"""
KEY = "AWQ_JAX_API_KEY"


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "serve",
        run,
        "serve a model over HTTP, as the OpenAI API has it",
        "Serve a model on this machine: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics, and a\n"
        "page to chat with at /. Many requests are answered at once: they share each step of the model. Needs\n"
        'pip install "awq-jax[serve]", or ".[serve]" in its sources. SIGTERM and Ctrl-C finish what is being\n'
        "answered, and end.",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="DIR", help="checkpoint directory, .gguf file or hub id")
    p.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: %(default)s)")
    p.add_argument("--port", type=int, default=8000, metavar="P", help="default: %(default)s; 0: one that is free")
    p.add_argument("--name", metavar="NAME", help="what clients call the model (default: the name of DIR)")
    cache = p.add_argument_group("cache")
    cache.add_argument("--max-slots", type=common.positive, default=16, metavar="N",
                       help="requests that are answered at once (default: %(default)s)")  # fmt: skip
    cache.add_argument("--max-length", type=common.positive, metavar="T",
                       help="tokens of a request, prompt and answer (default: what the model reads and half of the "
                       "free memory holds, at most 8192)")  # fmt: skip
    cache.add_argument("--prefill-chunk", type=common.positive, default=256, metavar="T",
                       help="tokens of prompts that are read between two steps (default: %(default)s)")  # fmt: skip
    cache.add_argument("--kv-bits", type=int, choices=(8,), help="keep keys and values in 8 bits")
    cache.add_argument("--no-prefix-reuse", action="store_true", help="read every prompt from its beginning")
    cache.add_argument("--image-tokens", type=common.positive, default=1024, metavar="T",
                       help="of one image, for models that take images of any size; larger ones are made smaller "
                       "(default: %(default)s)")  # fmt: skip
    limits = p.add_argument_group("limits")
    limits.add_argument("--api-key", action="append", default=[], metavar="KEY",
                        help=f"one that clients must have; may be repeated (or ${KEY}, which others on the machine "
                        "cannot see)")  # fmt: skip
    limits.add_argument("--queue", type=int, default=256, metavar="N",
                        help="requests that may wait; others are refused (429; default: %(default)s)")  # fmt: skip
    limits.add_argument(
        "--body-limit",
        type=float,
        metavar="MB",
        help="of a request (default: 4, or 32 for a model that looks at images)",
    )
    limits.add_argument("--timeout", type=float, default=600.0, metavar="S",
                        help="seconds that a request may take (default: %(default)s)")  # fmt: skip
    limits.add_argument("--drain-timeout", type=float, default=30.0, metavar="S",
                        help="seconds that requests have to finish at the end (default: %(default)s)")  # fmt: skip
    p.add_argument("--devices", type=common.devices, metavar="N", help="spread the weights over N devices, or 'all'")
    common.add_adapter(p)
    common.add_dtype(p)


def run(args: argparse.Namespace) -> None:
    """Load, warm up, serve."""
    for name in ("body_limit", "timeout", "drain_timeout"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be a positive number; got {getattr(args, name)}")
    if args.queue < 0 or not 0 <= args.port < 1 << 16:
        raise ConfigError("--queue must be 0 or more, and --port from 0 to 65535")
    keys = tuple(args.api_key) or tuple(k for k in (os.environ.get(KEY, ""),) if k)
    if not all(keys):
        raise ConfigError("--api-key is empty")
    try:
        from awq_jax.server import app, metrics, running, service
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] == "awq_jax":
            raise
        text = f"serve needs the package {e.name}: {install('serve')}"
        raise MissingPackageError(text) from None
    import jax
    from tqdm.auto import tqdm

    from awq_jax.serve import model
    from awq_jax.serve.engine.engine import Engine

    devices = len(jax.devices()) if args.devices == 0 else args.devices
    loaded = model.load(args.dir, args.dtype, mesh=devices, adapter=common.adapters(args), terms=args.terms)
    watch = metrics.Metrics()
    with tqdm(desc="compile", unit="program", disable=args.quiet, leave=False) as bar:

        def told(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        engine = Engine(
            loaded, slots=args.max_slots, length=args.max_length, chunk=args.prefill_chunk, kv_bits=args.kv_bits,
            queue=args.queue, reuse=not args.no_prefix_reuse, image_tokens=args.image_tokens, watch=watch,
            told=told,
        )  # fmt: skip
    common.say("\n".join(engine.explain().splitlines()[1:]), args.quiet)  # the first was logged when it was done
    name = args.name or Path(args.dir).name.removesuffix(".gguf") or "model"
    limit = None if args.body_limit is None else max(int(args.body_limit * (1 << 20)), 1)
    settings = service.Settings(name, keys, limit, args.timeout, args.drain_timeout)

    def ready(address: str) -> None:
        if args.json:
            print(common.to_json({"address": address, "model": name}, indent=None), flush=True)
        common.say(f"{name} at {address}/v1, to chat with at {address}/; metrics at {address}/metrics", args.json)
        if args.host not in ("127.0.0.1", "::1", "localhost") and not keys:
            common.say("others in the network can use it: --api-key asks them for a key")

    running.serve(app.app(engine, settings, watch), args.host, args.port, ready)
