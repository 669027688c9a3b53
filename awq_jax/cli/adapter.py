"""``awq-jax adapter``: a LoRA adapter of the float model in the terms of a quantized base."""

from __future__ import annotations

import argparse

from awq_jax.cli import common
from awq_jax.errors import ConfigError

_EXAMPLES = """
awq-jax adapter rescale ./sql-lora --base ./Qwen3-0.6B-awq ./sql-lora-awq
awq-jax adapter rescale ./sql-lora --base ./someones-AWQ --float ./Qwen3-0.6B ./sql-lora-awq
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "adapter",
        run,
        "rescale a LoRA adapter of the float model for an AWQ checkpoint",
        "AWQ folds scales into the weights, so that an adapter trained on the float model adds something else to the\n"
        "quantized one. rescale writes it in the base's terms, A diag(s) and diag(1/t) B, for PEFT, vLLM and us.\n"
        "Checkpoints of ours keep their scales (folded_scales.npz); for those of other makers --float finds them.",
        _EXAMPLES,
    )
    p.add_argument("action", choices=("rescale",), help="what to do")
    p.add_argument("adapter", metavar="ADAPTER", help="directory of PEFT's: adapter_config.json and its tensors")
    p.add_argument("dst", metavar="DST", help="directory to create")
    p.add_argument("--base", required=True, metavar="DIR", help="quantized checkpoint that it will be served on")
    p.add_argument("--float", dest="original", metavar="DIR",
                   help="the float model, by which the scales of a base that keeps none are found")  # fmt: skip
    p.add_argument("--terms", choices=("auto", "float"), default="auto",
                   help="on what ADAPTER was trained (default: as it says, else the float model)")  # fmt: skip
    p.add_argument("--overwrite", action="store_true", help="replace DST if it is an adapter")


def run(args: argparse.Namespace) -> None:
    """Read, rescale, write."""
    from awq_jax import lora, models  # JAX, for which --help must not wait
    from awq_jax.adapters import attach, base, files
    from awq_jax.convert import registry

    source = registry.open_source(args.base, packed=True)
    adapter, known = files.read(args.adapter), base.of(source)
    known = base.Base(args.base, known.format, known.scales)
    told = {}
    if args.original is not None:
        if known.scales:
            raise ConfigError(f"{args.base} keeps its scales; leave --float out")
        found = lora.recover(source, registry.open_source(args.original))
        known = base.Base(args.base, known.format, found.scales)
        told = {"fit_error": found.error, "worst": found.worst}
    fitted = base.fitted(adapter, known, args.terms)
    attach.placed(fitted, models.config_of(source))  # refused where it would be when it is served
    files.write(fitted, args.dst, args.overwrite)
    changed = sum(fitted.factors[m].a is not f.a for m, f in adapter.factors.items())
    result = {"written": args.dst, "modules": len(fitted.factors), "rescaled": changed, "scales": known.digest, **told}
    if args.json:
        print(common.to_json(result))
        return
    if told:
        print(f"scales found from weights: relative error {told['fit_error']:.3g}, at worst {told['worst']}")
    print(f"wrote {args.dst}: {len(fitted.factors)} modules, " + (f"{changed} rescaled" if changed else "as they were"))
