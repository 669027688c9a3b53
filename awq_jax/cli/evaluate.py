"""``awq-jax eval``: perplexity of a checkpoint on a text, and its divergence from another checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from awq_jax.cli import common

_EXAMPLES = """
awq-jax eval ./model-awq --text test.txt
awq-jax eval ./model-awq --text test.txt --against ./model --json
awq-jax eval ./model-awq --text test.txt --context 1024 --stride 512 --max-tokens 50000
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "eval",
        run,
        "perplexity on a text, and KL against another model",
        "Perplexity with its standard error. Every token but the first is scored once, in windows of --context\n"
        "tokens that start --stride tokens apart.",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="DIR", help="checkpoint directory, .gguf file or hub id")
    p.add_argument("--text", required=True, metavar="FILE", help=".txt, .jsonl or .parquet, or 'default'")
    p.add_argument("--against", metavar="DIR", help="also print KL(DIR's model || this model)")
    p.add_argument("--context", type=common.positive, help="tokens per window (default: 512, or the model's maximum)")
    p.add_argument("--stride", type=common.positive, help="tokens between windows (default: the context)")
    p.add_argument("--max-tokens", type=common.positive, metavar="N", help="score at most N tokens")
    p.add_argument("--batch-size", type=common.positive, metavar="N", help="windows per forward pass")
    common.add_dtype(p)


def run(args: argparse.Namespace) -> None:
    """Load, score, print."""
    text = read_text(args.text)
    from awq_jax import data, evaluate  # JAX, for which --help must not wait
    from awq_jax.serve import model

    quantized = model.load(args.dir, args.dtype)
    context = args.context or min(512, quantized.config.max_length)
    settings = {
        "context": context,
        "stride": args.stride,
        "max_tokens": args.max_tokens,
        "batch_size": args.batch_size,
        "progress": not args.quiet,
    }
    tokens = data.encode(text, quantized.tokenizer)
    score = evaluate.perplexity(quantized, tokens, **settings)
    divergence = None
    if args.against:
        divergence = evaluate.kl(quantized, model.load(args.against, args.dtype), tokens, **settings)
    if args.json:
        result = {"model": args.dir, "text": args.text, "context": context, "stride": args.stride or context}
        result |= score.to_dict()
        if divergence is not None:
            result["against"] = {"model": args.against} | divergence.to_dict()
        print(common.to_json(result))
        return
    print(f"perplexity  {score.ppl:.4f}")
    print(f"nll         {score.nll:.5f}{_error(score.standard_error)} nats per token")
    print(f"tokens      {score.tokens:,} in {len(score.window_nll):,} windows of {context}")
    if divergence is not None:
        print(f"KL          {divergence.kl:.5f}{_error(divergence.standard_error)} nats per token, from {args.against}")
        print(f"agreement   {divergence.agreement:.2%} of tokens have the same first choice")


def read_text(source: str) -> str:
    """The text of a file, its documents joined by blank lines; ``default`` is Python's help topics.

    Raises:
      CalibrationError: if it cannot be read.
    """
    from awq_jax.data import sources  # imports NumPy

    documents = sources.default_documents() if source == "default" else sources.read_file(Path(source))
    return "\n\n".join(documents)


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.5f}"
