"""Calibrate once, keep the statistics on disk, and quantize to three settings from them.

python examples/calibrate_once.py SOURCE [CALIBRATION_FILE]
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import awq_jax
from awq_jax import data, evaluate

SETTINGS: dict[str, dict[str, Any]] = {
    "4-bit": {"bits": 4},
    "3-bit": {"bits": 3},
    "mixed": {"bits": 3, "overrides": {r"down_proj": {"bits": 4}}},
}


def main(
    source: str | Path, stats_file: str | None = None, samples: int = 16, eval_tokens: int = 2048, group_size: int = 32
) -> dict[str, float]:
    model = awq_jax.load(source)
    params = model.params
    # Calibration text and evaluation text come from different ends of the same book.
    length = min(256, model.config.max_length)
    text = data.load(
        "builtin", model.tokenizer, samples=2 * samples, seq_len=length, vocab_size=model.config.vocab_size
    )
    calibration_tokens, held_out = text.tokens[:samples], text.tokens[samples:].reshape(-1)[:eval_tokens]

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(stats_file or Path(scratch) / "stats.safetensors")
        batches = [calibration_tokens[i : i + 4] for i in range(0, samples, 4)]
        awq_jax.calibrate(model.apply, params, batches).save(path)
        calib = awq_jax.Calibration.load(path)
        rows = {"float": evaluate.perplexity(model, held_out, context=length).nll}
        for name, settings in SETTINGS.items():
            model.params = awq_jax.quantize(params, calib, group_size=group_size, **settings)
            rows[name] = evaluate.perplexity(model, held_out, context=length).nll
    for name, nll in rows.items():
        print(f"{name:8s} nll {nll:.4f}")
    return rows


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
