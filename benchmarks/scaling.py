"""Plans for large models, and what a layer costs: the numbers of `docs/guides/large-models.md`.

    python benchmarks/scaling.py plan 70b --devices 1 --out benchmarks/results/scaling_plan_70b.json
    python benchmarks/scaling.py plan 405b --devices 8 --out benchmarks/results/scaling_plan_405b.json
    python benchmarks/scaling.py check --devices 2
    python benchmarks/scaling.py cost DIR --out benchmarks/results/scaling_cost_cpu.json

`plan` makes the package's own `Session` for the architecture and compiles, for a GPU that need not be there, the
programs that it runs on a layer, at their true shapes (`scaling_programs`; the CUDA plugin comes with ``pip
install "awq-jax[cuda-offline]"``). It prints what the fullest device holds at each step (`scaling_plan`), the host's
memory, the disk, and the operations of a layer (`scaling_flops`) with the time that they take at rates which are
assumptions: ``--products``, ``--bf16-products``, ``--numbers``, ``--row``, ``--disk-rate``. Nothing of the model's
size is allocated and no program runs: half a minute on two cores.

`check` compares what the plan says the package holds with the arrays alive in a small run (`scaling_check`).

`cost` runs one layer at several sizes on this machine and says how well the counts of the smaller ones predict the
last (`scaling_cost`): some minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

RESERVED = 0.75  # of a GPU's memory, what JAX takes by default


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """See the module; prints a table."""
    import jax
    import scaling_plan

    p = scaling_plan.make(args.model, args.devices, args.device_bytes)
    steps = p.steps()
    peak = max(s.total for s in steps)
    result = {
        "command": f"python benchmarks/scaling.py plan {args.model} --devices {args.devices}",
        "compiled_for": p.compiler.name,
        "jax": jax.__version__,
        "devices": args.devices,
        "device_bytes": args.device_bytes,
        "calibration": f"{scaling_plan.SAMPLES} x {scaling_plan.LENGTH} tokens",
        "layers": len(p.config.layers),
        "layer_bytes": scaling_plan.nbytes(p.leaves),
        "steps": [{"step": s.name, "bytes": s.total, "holds": s.holds} for s in steps],
        "peak_bytes": peak,
        "fits": peak <= args.device_bytes,
        "fits_by_default": peak <= RESERVED * args.device_bytes,
        "host": scaling_plan.host(p),
        "disk": scaling_plan.disk(p),
        "work": work(p, args),
    }
    print(table(result))
    return result


def work(p: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Operations of a layer, on the device that does most, and seconds at the assumed rates."""
    import scaling_flops
    import scaling_plan

    settings, d = p.settings, args.devices
    heads = p.config.layers[0].attention
    size = heads.heads * heads.head_dim
    calibration = scaling_flops.calibrate(p.shapes, p.tokens, scaling_plan.LENGTH, size)
    share = (
        math.ceil(p.tokens / scaling_plan.BATCH_TOKENS_ELSEWHERE / d) * scaling_plan.BATCH_TOKENS_ELSEWHERE / p.tokens
    )
    find, cut, rows = scaling_flops.Work(), scaling_flops.Work(), 0
    for g in p.shapes:
        searched, rounded = scaling_flops.per_device(g, settings, d)
        find, cut = find + searched, cut + rounded
        rows += scaling_flops.ROUNDS * g.k * math.ceil(g.pieces / d)
    seconds = {
        "calibrate": calibration.products * share / args.bf16_products,
        "search": (find.products + find.factors) / args.products + find.numbers / args.numbers,
        "round": (cut.products + cut.factors) / args.products + cut.numbers / args.numbers,
        "rows one after another": rows * args.row,
    }
    read = scaling_plan.nbytes(p.leaves) / args.disk_rate
    each = max(sum(seconds.values()), read)
    return {
        "products": {"calibrate": calibration.products * share, "search": find.products, "round": cut.products},
        "factors": {"search": find.factors, "round": cut.factors},
        "numbers": {"search": find.numbers, "round": cut.numbers},
        "rows": rows,
        "assumed": {
            "products_per_s": args.products,
            "bf16_products_per_s": args.bf16_products,
            "numbers_per_s": args.numbers,
            "seconds_per_row": args.row,
            "disk_bytes_per_s": args.disk_rate,
        },
        "seconds_per_layer": seconds,
        "seconds_reading_a_layer": read,
        "hours": each * len(p.config.layers) / 3600,
    }


def table(r: dict[str, Any]) -> str:
    """For a terminal; GB are 1e9 bytes."""
    gb = 1e9
    lines = [f"compiled for {r['compiled_for']}, {r['devices']} device(s) of {r['device_bytes'] / gb:.0f} GB"]
    lines += [f"{'step':40}{'GB':>7}  of that"]
    for s in r["steps"]:
        parts = ", ".join(f"{k} {n / gb:.1f}" for k, n in s["holds"].items() if n >= 0.05 * gb)
        lines.append(f"{s['step']:40}{s['bytes'] / gb:7.1f}  {parts}")
    share = r["peak_bytes"] / r["device_bytes"]
    says = "fits" if r["fits"] else "DOES NOT FIT"
    if r["fits"] and not r["fits_by_default"]:
        says = f"fits with XLA_PYTHON_CLIENT_MEM_FRACTION={math.ceil(share * 20 + 1) / 20:.2f} (default {RESERVED})"
    lines.append(f"fullest moment: {r['peak_bytes'] / gb:.1f} GB, {share:.0%} of a device: {says}")
    for where in ("host", "disk"):
        parts = ", ".join(f"{k} {n / gb:.1f}" for k, n in r[where].items())
        lines.append(f"{where}: {sum(n for k, n in r[where].items() if 'read)' not in k) / gb:.1f} GB ({parts})")
    w = r["work"]
    spent = ", ".join(f"{k} {s:.1f}" for k, s in w["seconds_per_layer"].items())
    lines += [
        "operations of a layer on the busiest device: "
        + ", ".join(f"{k} {n:.2e}" for k, n in w["products"].items())
        + " in products; "
        + ", ".join(f"{k} {n:.2e}" for k, n in w["factors"].items())
        + " in factorizations; "
        + ", ".join(f"{k} {n:.2e}" for k, n in w["numbers"].items())
        + f" number by number; {w['rows']} rows one after another",
        f"seconds of a layer at ASSUMED rates: {spent}; reading {w['seconds_reading_a_layer']:.1f} (meanwhile)",
        f"{r['layers']} layers: {w['hours']:.1f} hours, if the rates are right: none was measured",
    ]
    return "\n".join(lines)


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """See `scaling_cost.run`."""
    import scaling_cost

    result = {
        "command": f"python benchmarks/scaling.py cost DIR --sizes {' '.join(map(str, args.sizes))}",
        "cores": os.cpu_count(),
        **scaling_cost.run(args),
        "load": os.getloadavg()[0],
    }
    for phase, row in result["phases"].items():
        print(
            f"{phase}: {row['cpu_s']:.1f} CPU s, predicted {row['predicted_s']:.1f} "
            f"({row['predicted_over_cpu']:.2f}); {row['ratio_to_smallest']:.1f} times the smallest size"
        )
    return result


def check(args: argparse.Namespace) -> dict[str, Any]:
    """See `scaling_check`."""
    import scaling_check

    steps = scaling_check.run(args.devices)
    for s in steps:
        print(f"{s['step']:28}{s['said'] / 1e6:9.2f} MB said{s['alive'] / 1e6:9.2f} alive  {s['said_over_alive']:.2f}")
    return {"command": f"python benchmarks/scaling.py check --devices {args.devices}", "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(required=True)
    p = sub.add_parser("plan", help="memory of each step, and operations, of a large model")
    p.add_argument("model", choices=("70b", "405b"))
    p.add_argument("--devices", type=int, default=1)
    p.add_argument("--device-bytes", type=int, default=80_000_000_000)
    p.add_argument("--products", type=float, default=30e12, help="float32 operations per second (default: %(default)g)")
    p.add_argument("--bf16-products", type=float, default=300e12, help="of calibration (default: %(default)g)")
    p.add_argument("--numbers", type=float, default=2e12, help="of what goes number by number (default: %(default)g)")
    p.add_argument("--row", type=float, default=20e-6, help="seconds of a row's step (default: %(default)g)")
    p.add_argument("--disk-rate", type=float, default=1e9, help="bytes per second (default: %(default)g)")
    p.set_defaults(run=plan)
    c = sub.add_parser("cost", help="measure a layer at several sizes")
    c.add_argument("directory", type=Path, help="for checkpoints of up to 0.3 GB, which are deleted again")
    c.add_argument("--sizes", type=int, nargs="+", default=[1024, 1536], help="hidden sizes; the last is predicted")
    c.set_defaults(run=cost)
    k = sub.add_parser("check", help="the plan's list against arrays that are alive, in a small run")
    k.add_argument("--devices", type=int, default=1, help="simulated")
    k.set_defaults(run=check)
    for each in (p, c, k):
        each.add_argument("--out", type=Path, help="write JSON here")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if args.run is check:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    result = args.run(args)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
