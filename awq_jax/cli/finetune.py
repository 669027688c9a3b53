"""``awq-jax finetune``: a LoRA adapter of a checkpoint, packed or float, trained on rows of text."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from awq_jax.cli import common
from awq_jax.errors import CheckpointError, ConfigError

_EXAMPLES = """
awq-jax finetune ./Qwen3-0.6B-awq --data chats.jsonl --out ./my-lora
awq-jax finetune ./Qwen3-0.6B-awq --data chats.jsonl --out ./my-lora --rank 32 --steps 500 --accumulate 4
awq-jax generate ./Qwen3-0.6B-awq "Hello" --chat --adapter ./my-lora
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "finetune",
        run,
        "train a LoRA adapter on packed or float weights",
        "Train a LoRA adapter of a checkpoint in any format that is read, and write it as PEFT and vLLM read it.\n"
        "Rows have messages (the assistant's are learnt), a prompt and a completion, or text. A run that was killed\n"
        "continues from its last held-out loss when the same command is given again, to the same bytes.",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="BASE", help="checkpoint directory, .gguf file or hub id")
    p.add_argument("--data", required=True, type=Path, metavar="FILE", help=".jsonl, .json or .parquet")
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to create")
    p.add_argument("--held-out", type=Path, metavar="FILE",
                   help="rows to measure the loss on (default: the last 5%% of DATA's, at most 64)")  # fmt: skip
    p.add_argument(
        "--rank", type=common.positive, default=16, metavar="R", help="of the factors (default: %(default)s)"
    )
    p.add_argument("--alpha", type=float, metavar="A", help="factors are scaled by A/R (default: 2R)")
    p.add_argument("--rslora", action="store_true", help="scale by A over the root of R")
    p.add_argument("--targets", default="all-linear", metavar="REGEX",
                   help="which weights, by path (default: %(default)s: all but router and head)")  # fmt: skip
    p.add_argument("--steps", type=common.positive, metavar="N", help="of the optimizer (default: once through DATA)")
    p.add_argument("--batch-size", type=common.positive, default=4, metavar="N",
                   help="rows at a time (default: %(default)s)")  # fmt: skip
    p.add_argument("--accumulate", type=common.positive, default=1, metavar="N", help="batches that make one step")
    p.add_argument("--seq-len", type=common.positive, default=512, metavar="N",
                   help="longer rows are cut (default: %(default)s, or the model's context)")  # fmt: skip
    p.add_argument("--pack", action="store_true", help="put short rows one after another into sequences of --seq-len")
    p.add_argument("--learning-rate", type=float, default=2e-4, metavar="X", help="(default: %(default)s)")
    p.add_argument("--warmup", type=float, default=0.05, metavar="X", help="share of the steps (default: %(default)s)")
    p.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="of AdamW (default: %(default)s)")
    p.add_argument("--clip", type=float, default=1.0, metavar="X", help="gradient's norm (default: %(default)s)")
    p.add_argument("--adapter-dtype", choices=("float32", "bfloat16"), default="float32", help="of the factors")
    p.add_argument("--no-remat", action="store_true", help="keep all activations for the gradient: faster, more memory")
    p.add_argument("--every", type=common.positive, default=20, metavar="N",
                   help="steps between held-out losses, and states on the disk (default: %(default)s)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of factors and order (default: %(default)s)")
    p.add_argument("--devices", type=common.devices, default=1, metavar="N",
                   help="use the first N devices, or all (default: %(default)s)")  # fmt: skip
    p.add_argument("--parallel", choices=("data", "tensor"), default="data",
                   help="what they share: the rows of a batch, or the weights (default: %(default)s)")  # fmt: skip
    p.add_argument("--restart", action="store_true", help="discard an unfinished run")
    p.add_argument("--overwrite", action="store_true", help="replace DIR if it is an adapter")
    common.add_dtype(p)


def run(args: argparse.Namespace) -> None:
    """Read, train, write."""
    dst = args.out.expanduser().absolute()
    work = dst.parent / f".{dst.name}.finetuning"
    if dst.exists() and not (args.overwrite and (dst / "adapter_config.json").is_file()):
        raise CheckpointError(f"{dst} exists; choose another target or pass --overwrite")
    import jax  # for which --help must not wait

    from awq_jax import models
    from awq_jax.convert import registry
    from awq_jax.lora import rows, training
    from awq_jax.serve import model

    devices = args.devices or jax.device_count()
    spread = args.parallel == "tensor" and devices > 1
    source = registry.open_source(args.dir)
    config, tokenizer = models.config_of(source), source.tokenizer()
    length = min(args.seq_len, config.max_length)
    data, cut = rows.read(args.data, tokenizer, length)
    if args.held_out is not None:
        held, _ = rows.read(args.held_out, tokenizer, length)
    else:
        data, held = rows.parted(data)
    total = sum(int(r.counts.sum()) for r in data)
    note = f", {cut} rows cut to {length} tokens" if cut else ""
    common.say(f"data: {len(data)} rows, {total:,} tokens to learn; {len(held)} held out{note}", args.quiet)
    data = rows.packed(data, length) if args.pack else data
    each = args.batch_size * args.accumulate
    settings = training.Training(
        rank=args.rank, alpha=args.alpha, targets=args.targets, rslora=args.rslora,
        steps=args.steps or -(-len(data) // each), batch_size=args.batch_size, accumulate=args.accumulate,
        learning_rate=args.learning_rate, warmup=args.warmup, weight_decay=args.weight_decay, clip=args.clip,
        dtype=args.adapter_dtype, remat=None if args.no_remat else "block", seed=args.seed, every=args.every,
        devices=1 if spread else devices,
    )  # fmt: skip
    if args.restart:
        shutil.rmtree(work, ignore_errors=True)
    loaded = model.load(args.dir, args.dtype, mesh=devices if spread else None)
    if loaded.config.vision is not None:
        raise ConfigError("models that look at images are not trained; quantize and serve them")
    done = training.finetune(loaded, settings, data, held, work=work, base=args.dir, progress=not args.quiet)
    training.write(done, dst, work, args.overwrite)
    if args.json:
        print(common.to_json({"written": str(dst), "resumed": done.resumed, "curve": done.curve}))
        return
    last = done.curve[-1]
    held_out = f", held out {last['held_out']:.4f}" if "held_out" in last else ""
    print(f"step {last['step']}: loss {last['loss']:.4f}{held_out}, {last['tokens_per_second']:.0f} tokens/s")
    print(f"wrote {args.out}: serve it with awq-jax generate {args.dir} --adapter {args.out}")
