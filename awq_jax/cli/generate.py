"""``awq-jax generate``: continue a prompt, streaming to the terminal."""

from __future__ import annotations

import argparse
import sys
import time

from awq_jax.cli import common
from awq_jax.errors import ConfigError

_EXAMPLES = """
awq-jax generate ./model-awq "Once upon a time" --max-new-tokens 200
awq-jax generate ./model-awq "Why is the sky blue?" --chat --temperature 0.7 --top-p 0.9
echo "Dear diary," | awq-jax generate ./model-awq - --stop "The end"
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "generate",
        run,
        "continue a prompt",
        "Continue a prompt; text appears as it is generated. Greedy unless --temperature is set.",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="DIR", help="checkpoint directory, .gguf file or hub id")
    p.add_argument("prompt", metavar="PROMPT", help="text, or - to read it from stdin")
    p.add_argument("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    p.add_argument("--max-new-tokens", type=common.positive, default=128, metavar="N", help="default: %(default)s")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (0: all)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="smallest set of tokens of probability P")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    p.add_argument("--seed", type=common.seed, default=0, help="of the random draws (default: %(default)s)")
    p.add_argument("--devices", type=common.devices, metavar="N", help="spread the weights over N devices, or 'all'")
    common.add_dtype(p)


def run(args: argparse.Namespace) -> None:
    """Load, generate, print."""
    try:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    except UnicodeDecodeError as e:
        raise ConfigError(f"the prompt is not {e.encoding.upper()} text (byte {e.start})") from None
    import jax  # which takes seconds, so not for --help

    from awq_jax import models
    from awq_jax.convert import registry
    from awq_jax.serve import generate, model, prompts
    from awq_jax.serve.sampling import Sampling

    # What cannot be done is refused before the weights are read.
    Sampling(args.temperature, args.top_k, args.top_p)
    if "" in args.stop:
        raise ConfigError("a stop string is empty")
    source = registry.open_source(args.dir)
    generate.check_prompts(models.config_of(source), prompts.encode(source.tokenizer(), prompt, args.chat))
    loaded = model.load(args.dir, args.dtype, mesh=len(jax.devices()) if args.devices == 0 else args.devices)
    start = time.perf_counter()

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    [text] = loaded.generate(
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=args.stop,
        seed=args.seed,
        stream=None if args.json else show,
        chat=args.chat,
    )
    if args.json:
        print(common.to_json({"prompt": prompt, "text": text, "seconds": time.perf_counter() - start}))
    else:
        print()
