"""``awq-jax quantize``: a float checkpoint in, a packed one out, with a summary and a report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from awq_jax.cli import common, engines, tables, tune
from awq_jax.config import BITS, METHOD_NAMES, SCALE_DTYPES, AwqConfig, Budget
from awq_jax.errors import AwqError, CheckpointError, ConfigError, FormatError, ProcessError, as_options

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from awq_jax.adapters.files import Adapter
    from awq_jax.devices.pool import Pool
    from awq_jax.models.config import ModelConfig
    from awq_jax.report import Report

_EXAMPLES = """
awq-jax quantize ./Qwen3-0.6B ./Qwen3-0.6B-awq
awq-jax quantize ./model ./model-w3 --bits 3 --group-size 64 --calib book.txt --report report.html
awq-jax quantize ./model ./model-w3.5 --target-bits 3.5 --group-sizes 32,64,128
awq-jax quantize ./model ./model-awq --override 'down_proj:bits=8' --skip 'layers/0/' --format awq-jax
awq-jax quantize ./model ./model-awq --samples 32 --json > report.json
awq-jax quantize ./model ./model-awq --push me/model-awq --private
awq-jax quantize ./Llama-70B ./Llama-70B-awq --hidden disk --dry-run
awq-jax quantize ./Llama-70B ./Llama-70B-awq --devices all
awq-jax quantize ./Llama-405B ./awq --coordinator host0:4321 --processes 2 --process-id 0   # and 1 on the other host
srun --nodes 2 awq-jax quantize ./Llama-405B ./awq --distributed
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "quantize",
        run,
        "quantize a checkpoint",
        "Quantize the weights of a checkpoint. What can be checked is checked before the long work begins.",
        _EXAMPLES,
    )
    p.add_argument("src", metavar="SRC", help="float checkpoint directory, .gguf file or hub id")
    p.add_argument("dst", metavar="DST", type=Path, help="directory to create")
    g = p.add_argument_group("quantization")
    g.add_argument("--bits", type=int, default=4, help="2, 3, 4 or 8 (default: %(default)s)")
    g.add_argument("--target-bits", type=float, metavar="B",
                   help="instead of --bits: the mean, scales and zero points included; bits are chosen for every "
                   "weight by what rounding it would cost at the end of the model")  # fmt: skip
    g.add_argument("--widths", type=common.integers, default=BITS, metavar="LIST",
                   help="bits to choose from for --target-bits (default: 2,3,4,8)")  # fmt: skip
    g.add_argument("--group-sizes", type=common.integers, default=(), metavar="LIST",
                   help="group sizes to choose from for --target-bits, as 32,128 (default: --group-size)")  # fmt: skip
    g.add_argument("--group-size", type=int, default=128, metavar="N",
                   help="rows per scale; -1: whole column (default: %(default)s)")  # fmt: skip
    g.add_argument("--method", default="awq+gptq", help=f"{', '.join(METHOD_NAMES)} (default: %(default)s)")
    g.add_argument("--symmetric", action="store_true", help="fixed zero point")
    g.add_argument("--serve-dtype", default="float16", choices=SCALE_DTYPES,
                   help="in which the engine will compute: scales are of this type (default: %(default)s)")  # fmt: skip
    g.add_argument("--no-clip", action="store_true", help="no search for clipping thresholds")
    g.add_argument("--sequential", action=argparse.BooleanOptionalAction, default=AwqConfig.sequential,
                   help="round each weight for the input that it has once those before it are quantized: nearer to the "
                   "float model, in one and a half to two and a half times the time")  # fmt: skip
    g.add_argument("--effort", choices=("normal", "best"), default="normal",
                   help="best: then also tune scales, norms and biases to the float model's predictions (see awq-jax "
                   "tune), on the same text")  # fmt: skip
    g.add_argument("--quantize-head", action="store_true", help="also quantize the output projection")
    g.add_argument("--skip", action="append", default=[], metavar="REGEX", help="leave weights float; may be repeated")
    g.add_argument("--override", action="append", default=[], metavar="REGEX:bits=B,group_size=G,symmetric=S",
                   help="other settings for some weights; the first match wins; may be repeated")  # fmt: skip
    g.add_argument("--on-indivisible", default="error", metavar="WHAT",
                   help="rows not a multiple of the group: error, pad or float (default: %(default)s)")  # fmt: skip
    c = p.add_argument_group("calibration")
    c.add_argument("--calib", metavar="SOURCE",
                   help="builtin (Python's help topics, no network), pileval, wikitext, c4, "
                   "hf:OWNER/NAME[:CONFIG[:SPLIT]] (with the datasets package), or a .txt, .jsonl, .json, .csv, "
                   ".parquet or .npy file (default: builtin; nothing with --method rtn)")  # fmt: skip
    common.add_column(c)
    common.add_bos(c, "sequences")
    common.add_samples(c)
    c.add_argument("--batch-size", type=common.positive, metavar="N",
                   help="sequences per forward pass (default: 512 tokens on a CPU, 8192 elsewhere)")  # fmt: skip
    c.add_argument("--seed", type=int, default=0, help="picks the excerpts (default: %(default)s)")
    o = p.add_argument_group("checkpoint")
    o.add_argument("--format", default="auto", metavar="NAME",
                   help="gemm: AutoAWQ's (vLLM, transformers); compressed-tensors: vLLM and transformers too, 2 to 8 "
                   "bits; awq-jax: holds every setting; auto: the first of these that can hold the result (default: "
                   "%(default)s); or another of awq-jax convert --list")  # fmt: skip
    o.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    o.add_argument("--adapter", action="append", default=[], metavar="DIR",
                   help="also write this LoRA adapter of the float model, rescaled by the scales that are folded into "
                   "DST, to DST-NAME beside it; may be repeated")  # fmt: skip
    o.add_argument("--report", type=Path, metavar="FILE", help="write a report, .html or .json")
    common.add_dtype(o)
    common.add_push(p)
    r = p.add_argument_group("run", "One block is in memory at a time. A run that was killed continues when the same "
                             "command is given again.")  # fmt: skip
    r.add_argument("--dry-run", action="store_true",
                   help="print blocks, memory, disk and time (of a trial on the first block), and stop")  # fmt: skip
    once = r.add_mutually_exclusive_group()
    once.add_argument("--resume", action="store_true", help="refuse to begin anew: there must be an unfinished run")
    once.add_argument("--restart", action="store_true", help="discard an unfinished run")
    r.add_argument("--hidden", default="memory", choices=("memory", "disk"),
                   help="where hidden states are between blocks; from disk a run continues at once (default: "
                   "%(default)s)")  # fmt: skip
    r.add_argument("--hidden-dtype", choices=common.FLOATS,
                   help="of hidden states between blocks (default: the model's)")  # fmt: skip
    d = p.add_argument_group(
        "devices",
        "They share the work, and the bits of the result do not depend on their number. Several processes\n  run the "
        "same command, each with its own --process-id, on a file system that they share; if one dies\n  the others end "
        "(exit code 3), and the same command in all of them continues.",
    )
    d.add_argument("--devices", type=common.devices, metavar="N",
                   help="use the first N devices, or all (default: 1; of several processes: all)")  # fmt: skip
    d.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens for the others")
    d.add_argument("--processes", type=common.positive, metavar="P", help="how many processes there are")
    d.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    d.add_argument("--distributed", action="store_true",
                   help="instead of these three: what JAX finds out (Slurm, Open MPI, Kubernetes, TPU)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Check, quantize block by block, report."""
    several = args.distributed or (args.coordinator, args.processes, args.process_id) != (None, None, None)
    if not several:
        return _run(args)
    from awq_jax.devices import team  # imports JAX, for which --help must not wait

    if args.distributed and (args.coordinator, args.processes, args.process_id) != (None, None, None):
        raise ConfigError("--distributed finds out what --coordinator, --processes and --process-id say: drop either")
    # Libraries of JAX that connect processes print to the standard output, which is for the result.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    team.join(args.coordinator, args.processes, args.process_id)
    try:
        _run(args)
    except (AwqError, OSError) as e:
        if args.debug:
            traceback.print_exc()
        code = team.EXIT if isinstance(e, ProcessError) else 2
        common.say(common.error(e))
        sys.stdout.flush()
        os._exit(code)  # JAX would wait at exit for the processes that have ended


def _run(args: argparse.Namespace) -> None:
    path = Path(os.path.abspath(args.dst))
    if not args.dry_run and not (path.parent / f".{path.name}.quantizing").exists():
        if args.resume:
            raise CheckpointError(f"there is no unfinished run of {args.dst} to continue; leave --resume out")
        common.check_new_directory(path, args.overwrite)
    common.check_report_path(args.report)
    config = settings(args)
    from awq_jax.devices import host_memory, pool  # as in `run`
    from awq_jax.devices.team import team

    host_memory.return_arrays_at_once()
    mesh = _mesh(args.devices)
    with team() as processes:
        _quantize(args, config, pool.pool_of(mesh, processes))


def _quantize(args: argparse.Namespace, config: AwqConfig, pool: Pool) -> None:
    from awq_jax.adapters import base as bases  # as in `run`
    from awq_jax.adapters import files
    from awq_jax.quantizer.targets import QUANTIZE_HEAD
    from awq_jax.stream import forecast
    from awq_jax.stream import run as stream
    from awq_jax.stream.job import Options, prepare

    if not args.dry_run and pool.rank == 0:
        common.check_push(args)
    if args.effort == "best" and pool.team is not None:
        raise ConfigError("--effort best is the work of one process: tune the result with awq-jax tune")
    start = time.perf_counter()
    options = Options(
        samples=args.samples,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        seed=args.seed,
        column=args.column,
        bos=args.bos,
        dtype=args.dtype,
        format=args.format,
        overwrite=args.overwrite or args.dry_run,
        hidden=args.hidden,
        hidden_dtype=args.hidden_dtype,
        budget=None if args.target_bits is None else Budget(args.target_bits, args.widths, args.group_sizes),
    )
    chosen = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    job = prepare(args.src, args.dst, args.calib, options, chosen, pool)
    first = pool.rank == 0
    if args.effort == "best" and job.batches and sum(map(len, job.batches)) < 2:
        raise ConfigError("--effort best needs two sequences or more, of which one is kept out: raise --samples")
    common.say(job.description, args.quiet or not first)
    read = time.perf_counter() - start
    if args.dry_run:
        needs = forecast.forecast(job)
        if first:
            print(common.to_json(needs.to_dict()) if args.json else forecast.table(needs))
        return
    adapters = _adapters(args, job.session.chain.config)
    done = stream.run(job, resume=args.resume, restart=args.restart, progress=not args.quiet)
    if not first:
        return
    for path, adapter in adapters.items():
        files.write(bases.fitted(adapter, bases.of(args.dst), "float"), path, args.overwrite)
    if args.effort == "best":
        common.say(f"{args.dst} is written ({done.format}); tuning it (awq-jax tune does, if this ends)", args.quiet)
        common.say(tune.gain(tune.tuned(args, args.dst, args.src, args.dst, True)), args.quiet)
    report = dataclasses.replace(done.report, seconds={"text": read, **done.report.seconds})
    if args.report:
        write_report(report, args.report, f"{args.src}, {report.bits_per_weight:.2f} bits per weight")
    if args.json:
        extra = {"format": done.format, "resumed": done.resumed}
        print(common.to_json(report.to_dict() | extra))
    else:
        print(as_options(str(report), [QUANTIZE_HEAD]))
        print(f"\nwrote {args.dst} ({done.format})" + (f" and {args.report}" if args.report else ""))
        print(f"served by {engines.served_by(args.dst)}")
        for path in adapters:
            print(f"wrote {path}: the adapter in its terms")
    common.push(args)


def _adapters(args: argparse.Namespace, config: ModelConfig) -> dict[Path, Adapter]:
    """The adapters to rescale, by where they will be written; refused before the long work."""
    from awq_jax.adapters import attach, files  # as in `run`

    out: dict[Path, Adapter] = {}
    for where in args.adapter:
        path = args.dst.parent / f"{args.dst.name}-{Path(where).absolute().name}"
        if path in out:
            raise ConfigError(f"two adapters would be written to {path}; rename one")
        if path.exists() and not args.overwrite:
            raise CheckpointError(f"{path} exists; choose another target or pass --overwrite")
        out[path] = files.read(where)
        attach.placed(out[path], config)
    return out


def _mesh(count: int | None) -> Mesh | None:
    """The first ``count`` devices."""
    if count is None:
        return None
    import jax  # as in `run`
    import numpy as np
    from jax.sharding import Mesh

    devices = jax.devices()
    if count > len(devices):
        raise ConfigError(f"--devices {count}: there are {len(devices)} ({devices[0].device_kind})")
    return Mesh(np.asarray(devices[: count or None]), ("devices",))


def settings(args: argparse.Namespace) -> AwqConfig:
    """The `AwqConfig` of the arguments.

    Raises:
      ConfigError: on a value out of range.
      FormatError: if the chosen format cannot hold what is asked for.
    """
    overrides = tuple(parse_override(text) for text in args.override)
    kinds = {(c.get("bits", args.bits), c.get("group_size", args.group_size)) for _, c in (*overrides, ("", {}))}
    gemm = kinds == {(4, args.group_size)} and args.on_indivisible != "pad" and not args.quantize_head
    if args.format == "gemm" and not (gemm and args.target_bits is None):
        raise FormatError(
            "format gemm holds 4-bit weights of one group size, without padding, and a float output projection; use "
            "--format compressed-tensors, or drop --bits, --target-bits, --override, --on-indivisible pad or "
            "--quantize-head"
        )
    return AwqConfig(
        bits=args.bits,
        group_size=args.group_size,
        symmetric=args.symmetric,
        method=args.method,
        clip=not args.no_clip,
        sequential=args.sequential,
        # A scale beside the weight fits in no other runtime's checkpoint.
        explicit_scale=args.format == "awq-jax",
        quantize_head=args.quantize_head,
        on_indivisible=args.on_indivisible,
        skip=tuple(args.skip),
        overrides=overrides,
        scale_dtype=args.serve_dtype,
    )


def parse_override(text: str) -> tuple[str, dict[str, int]]:
    """``"down_proj:bits=8,symmetric=true"`` as ``("down_proj", {"bits": 8, "symmetric": True})``.

    Raises:
      ConfigError: if it is not of this form.
    """
    pattern, colon, rest = text.rpartition(":")
    change: dict[str, int] = {}
    for item in rest.split(","):
        key, equals, value = item.strip().partition("=")
        try:
            parsed = json.loads(value.strip().lower())
        except json.JSONDecodeError:
            parsed = None
        kind = bool if key == "symmetric" else int
        if not (colon and pattern and equals and type(parsed) is kind):
            raise ConfigError(f"override {text!r} is not of the form REGEX:bits=8,group_size=32,symmetric=true")
        change[key] = parsed
    return pattern, change


def write_report(report: Report, path: Path, title: str) -> None:
    """Write ``report`` as HTML or JSON, by the path's suffix."""
    if path.suffix == ".html":
        path.write_text(tables.html(report, title), encoding="utf-8")
    else:
        path.write_text(common.to_json(report.to_dict()) + "\n", encoding="utf-8")
