"""``awq-jax eval``: perplexity of a checkpoint on a text, and its divergence from another checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from awq_jax.cli import common
from awq_jax.errors import ConfigError

_EXAMPLES = """
awq-jax eval ./model-awq --text test.txt
awq-jax eval ./model-awq --text test.txt --against ./model --json
awq-jax eval ./model-awq --text test.txt --against ./model --card
awq-jax eval ./model-awq --text test.txt --adapter ./sql-lora
awq-jax eval ./model-awq --text test.txt --context 1024 --stride 512 --max-tokens 50000
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "eval",
        run,
        "perplexity on a text, and KL against another model",
        "Perplexity with its standard error. Every token is scored once (without BOS: but the first), in windows of\n"
        "--context tokens that start --stride tokens apart.",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="DIR", help="checkpoint directory, .gguf file or hub id")
    p.add_argument("--text", required=True, metavar="FILE", help=".txt, .jsonl or .parquet, or 'builtin'")
    common.add_column(p)
    p.add_argument("--against", metavar="DIR", help="also print KL(DIR's model || this model)")
    p.add_argument("--context", type=common.positive, help="tokens per window (default: 512, or the model's maximum)")
    p.add_argument("--stride", type=common.positive, help="tokens between windows (default: the context)")
    p.add_argument("--max-tokens", type=common.positive, metavar="N", help="score at most N tokens")
    p.add_argument("--batch-size", type=common.positive, metavar="N", help="windows per forward pass")
    p.add_argument("--card", action="store_true", help="also put the perplexity into DIR's model card (README.md)")
    common.add_adapter(p)
    common.add_bos(p, "windows")
    common.add_dtype(p)


def run(args: argparse.Namespace) -> None:
    """Load, score, print."""
    from awq_jax import data, evaluate, models  # JAX, for which --help must not wait
    from awq_jax.convert import card_score, registry
    from awq_jax.data import tokens
    from awq_jax.serve import model

    # What cannot be done is refused before the weights of anything are read.
    data.check_source(args.text)
    adapter = common.adapters(args)
    if isinstance(adapter, dict) and len(adapter) > 1:
        raise ConfigError("eval scores one adapter at a time: give one --adapter")
    if args.card:
        card_score.card_of(args.dir)
    opened = [registry.open_source(path) for path in (args.dir, args.against) if path is not None]
    configs = [models.config_of(source) for source in opened]
    vocabularies, limit = {c.vocab_size for c in configs}, min(c.max_length for c in configs)
    if len(vocabularies) > 1:
        raise ConfigError(f"KL needs the same vocabulary; the models have {sorted(vocabularies)} tokens")
    context = args.context or min(512, limit)
    evaluate.check_settings(limit, context, args.stride)
    tokenizer = opened[0].tokenizer()
    read, texts = data.read_texts(args.text, tokenizer, args.column)
    common.say(f"text: {read}", args.quiet)
    begin = tokens.beginning(tokenizer, args.bos).text
    ids = data.encode("\n\n".join(texts), tokenizer)
    evaluate.check_text(ids, *vocabularies)
    loaded = model.load(args.dir, args.dtype, adapter=adapter, terms=args.terms)
    quantized = loaded.adapted() if adapter is not None else loaded
    settings = {
        "context": context,
        "stride": args.stride,
        "max_tokens": args.max_tokens,
        "batch_size": args.batch_size,
        "bos": args.bos,
        "progress": not args.quiet,
    }
    score = evaluate.perplexity(quantized, ids, **settings)
    divergence = None
    if args.against:
        divergence = evaluate.kl(quantized, model.load(args.against, args.dtype), ids, **settings)
    if args.card:
        told = f"{score.ppl:.3f} on {score.tokens:,} tokens of {Path(args.text).name}, windows of {context}"
        if divergence is not None:
            told += f"; KL {divergence.kl:.4f} nats per token from {Path(args.against).name}"
        common.say(f"written into {card_score.add(args.dir, told)}", args.quiet)
    if args.json:
        result = {
            "model": args.dir,
            "text": args.text,
            "read": read,
            "context": context,
            "stride": args.stride or context,
            "begins_with": begin,
        }
        result |= {"adapter": args.adapter[0]} if args.adapter else {}
        result |= score.to_dict()
        if divergence is not None:
            result["against"] = {"model": args.against} | divergence.to_dict()
        print(common.to_json(result))
        return
    print(f"perplexity  {score.ppl:.4f}")
    print(f"nll         {score.nll:.5f}{_error(score.standard_error)} nats per token")
    begins = f", each begins with {begin}" if begin else ""
    print(f"tokens      {score.tokens:,} in {len(score.window_nll):,} windows of {context}{begins}")
    if divergence is not None:
        print(f"KL          {divergence.kl:.5f}{_error(divergence.standard_error)} nats per token, from {args.against}")
        print(f"agreement   {divergence.agreement:.2%} of tokens have the same first choice")


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.5f}"
