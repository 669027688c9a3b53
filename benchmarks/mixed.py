"""Bits chosen by the weight for a given mean, against the straight line between uniform widths at the same bytes.

    python benchmarks/mixed.py SmolLM2.gguf --text wiki.txt --group-size 64 --out results/mixed_smollm2.json

Calibration and scored text as in quality.py. For each of ``--targets``, a share of the way from the bytes of uniform
``--low`` to those of uniform ``--high`` bits, one row: the divergence from the float model (KL), and its ratio to what
the straight line between the two uniform models has at the bytes really taken.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import quality
from shared import checkpoints, running

import awq_jax
from awq_jax import Budget, evaluate
from awq_jax.config import BITS


def mixed(
    model: str,
    *,
    text: Path | None = None,
    low: int = 3,
    high: int = 4,
    group_size: int = 64,
    group_sizes: tuple[int, ...] = (),
    widths: tuple[int, ...] = BITS,
    samples: int = 8,
    seq_len: int = 512,
    eval_tokens: int = 20480,
    targets: tuple[float, ...] = (0.5,),
    settings: tuple[str, ...] = (),
) -> running.Row:
    """Two uniform widths, and what lies between them."""
    loaded = awq_jax.load(model)
    length = min(seq_len, loaded.config.max_length)
    calib, scored = quality.texts(loaded, text, samples, length, eval_tokens)
    params = loaded.params
    reference = quality.Reference(loaded.apply, params)
    asked: dict[str, Any] = {"group_size": group_size, "samples": samples, "seq_len": length, "progress": False}
    rows: list[dict[str, Any]] = []

    def row(name: str, **how: Any) -> dict[str, Any]:
        loaded.params = params
        report, spent = running.measured(loaded.quantize, calib, **asked, **how, **running.settings(settings))
        far = evaluate.kl(loaded, reference, scored, context=length)
        packed = sum(r.bytes_after for r in report.layers)
        rows.append(
            {"name": name, "kl": far.kl, "kl_error": far.standard_error, "packed_bytes": packed,
             "bits_per_weight": report.bits_per_weight, "cpu_seconds": round(spent.cpu, 1)}
        )  # fmt: skip
        return rows[-1]

    ends = [row(f"{bits} bits", bits=bits) for bits in (low, high)]
    print(*rows, sep="\n", flush=True)
    for share in targets:
        least, most = (end["bits_per_weight"] for end in ends)
        bits = (1 - share) * least + share * most
        made = row(f"target {bits:.3f}", target_bits=Budget(bits, widths, group_sizes))
        at = (made["packed_bytes"] - ends[0]["packed_bytes"]) / (ends[1]["packed_bytes"] - ends[0]["packed_bytes"])
        made["line"] = (1 - at) * ends[0]["kl"] + at * ends[1]["kl"]
        made["vs_line"] = made["kl"] / made["line"]
        print(made, flush=True)
    return {
        "model": Path(model).name,
        "group_size": group_size,
        "group_sizes": group_sizes,
        "widths": widths,
        "calibration_tokens": int(calib.size),
        "scored_tokens": int(scored.size),
        "rows": rows,
        "device": str(jax.devices()[0]),
        **running.machine(),
    }


def smoke(directory: Path) -> Iterator[list[str]]:
    model, _ = checkpoints.tiny(directory)
    quick = ["--samples", "2", "--seq-len", "16", "--eval-tokens", "32", "--group-size", "32"]
    yield [model, *quick, "--settings", "clip=False", "n_grid=2", "--out", str(directory / "r.json")]


main = functools.partial(running.run, (mixed,), smoke)

if __name__ == "__main__":
    main()
