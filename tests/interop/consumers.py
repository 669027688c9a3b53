"""Every family of models in the programs that read AWQ checkpoints: logits equal to ours, or the program's error.

    AWQ_JAX_INTEROP_ENVS=DIR python tests/interop/consumers.py [FAMILY ...]

writes benchmarks/results/consumers.json and consumers.md; with names only their rows are made anew. The weights are
random: names, fusions, and scales folded into norms are what matters.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))  # when run as a program

import family_cases
import jax.numpy as jnp
import multimodal
import numpy as np
import peers
import tiny_checkpoints
import torch
import torch_references

import awq_jax
from awq_jax import paths
from awq_jax.convert.arrays import codes
from awq_jax.models.config import MoEConfig
from awq_jax.qtensor import QuantizedTensor

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "consumers.json"
GROUP = 32
TARGETS = re.compile(r"^layers/.*/kernel$")
KEPT = re.compile(r"mlp/gate/kernel$|/shared_expert_gate/kernel$")  # routers, and what makes one number of each token
IDS = np.random.default_rng(1).integers(100, 300, 24)
CALIBRATION = np.random.default_rng(2).integers(100, 300, (8, 64)).astype(np.int32)

# The tiny models of the default tests are too narrow for groups of 32: these keys get these values, ...
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 256),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 64),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "kv_channels"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    **dict.fromkeys(("initializer_range", "init_std"), 0.06),
    **dict.fromkeys(("n_heads", "num_attention_heads", "n_head"), 4),
    "vocab_size": 320,
    "rotary_dim": 16,
    "max_position_embeddings": 128,
}
# ... and what goes with half of a head's size, or with the depth of a picture, is four times as long.
LONGER = ("short_factor", "long_factor")


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A program that reads a format.

    Attributes:
      format: that it reads.
      environment: of `peers`.
      loader: of ``read_many.py``.
      tolerance: of the logits, relative to the largest.
      symmetric: weights without zero points.
      experts: only models with experts are tried.
      rerouted: of the `IDS`, so many may go to other experts than ours, and then get other logits.
    """

    format: str
    environment: str
    loader: str
    tolerance: float
    symmetric: bool = False
    experts: bool = False
    rerouted: int = 0


HALF = 2e-3  # GPTQModel's kernels for the CPU round each dequantized weight to float16
ALL_HALF = 2e-2  # its loader computes all in float16, what the choice of experts is made from, too
FLOAT32 = 5e-5
CONSUMERS = {
    "gemm, transformers + GPTQModel": Consumer("gemm", "gptqmodel", "transformers", HALF),
    "gemm, GPTQModel's loader": Consumer("gemm", "gptqmodel", "gptqmodel", ALL_HALF, experts=True, rerouted=1),
    "compressed-tensors, older": Consumer("compressed-tensors", "compressed", "transformers", FLOAT32),
    "compressed-tensors": Consumer("compressed-tensors", "transformers", "transformers", FLOAT32),
    "compressed-tensors, `dequantize=True`": Consumer("compressed-tensors", "transformers", "dequantized", FLOAT32),
    "compressed-tensors, symmetric": Consumer(
        "compressed-tensors", "transformers", "transformers", FLOAT32, symmetric=True
    ),
}
GEMM, LOADER, CT_OLDER, CT, CT_DEQUANTIZED, CT_SYMMETRIC = CONSUMERS
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "glm4_moe", "phimoe", "qwen3_next")
MOE += ("granitemoe", "granitemoeshared", "gpt_oss", "dots1", "ernie4_5_moe", "glm4_moe_lite", "minimax_m2")
MOE += ("solar_open",)
STACKED = ("granitemoe", "granitemoeshared", "gpt_oss")
REMOTE = ("Yi", "aquila", "baichuan", "internlm2", "minicpm", "qwen", "exaone", "RefinedWeb", "RefinedWebModel")
CASES: dict[str, family_cases.Case | multimodal.Case] = {
    c.family: c for c in reversed((*family_cases.CASES, *multimodal.CASES))
}
NAMES = tuple(sorted(CASES))
PACKED_CT = (CT_OLDER, CT, CT_SYMMETRIC)
# What a program cannot read, and a part of the error it gives.
REFUSED: dict[tuple[str, str], str] = {
    # Since 5.23 transformers compares zero points with those of the unpacked weight.
    **{(f, CT): "ignore_mismatched_sizes" for f in NAMES},
    # transformers 5 has a layer's experts in one tensor, and nothing that takes AWQ's tensors of single experts.
    **{(f, GEMM): "missing_keys" for f in MOE},
    # ... and its router, which is called otherwise in files, is made a packed linear, which 4 outputs do not fit.
    ("phimoe", GEMM): "must be divisible",
    ("qwen3_next", GEMM): "must be divisible",  # in_proj_ba of this tiny model has 8 outputs
    # For those of compressed-tensors it has, but it leaves out their zero points,
    **{(f, c): "automatic conversion of the weights" for f in MOE for c in (CT_OLDER, CT, CT_DEQUANTIZED)},
    # and it knows of these only the stacked names that they are published with.
    **{(f, c): "missing_keys" for f in STACKED for c in (CT_OLDER, CT_DEQUANTIZED, CT_SYMMETRIC)},
    **{(f, CT): "ignore_mismatched_sizes" for f in STACKED},
    # GPTQModel takes experts only by the names it gives them itself, not by those that AutoAWQ and vLLM share.
    **{(f, LOADER): "not read" for f in ("mixtral", "granitemoe", "phimoe", "qwen3_next", "minimax_m2")},
    ("ernie4_5_moe", LOADER): "e_score_correction_bias",  # has another name in transformers
    ("granitemoeshared", LOADER): "Unsupport model_type",
    # In its own rewrite of the router.
    **{(f, LOADER): "'tuple' object has no attribute 'sigmoid'" for f in ("glm4_moe", "glm4_moe_lite")},
    # Run only with code from the checkpoint.
    **{(f, c): "does not recognize this architecture" for f in REMOTE for c in (GEMM, *PACKED_CT, CT_DEQUANTIZED)},
    **{("kimi_k2", c): "does not recognize this architecture" for c in CONSUMERS},
    # transformers' own code for these reads .weight of a linear, which a packed one does not have.
    **{("gpt_bigcode", c): "has no attribute 'weight'" for c in (GEMM, CT_OLDER, CT_SYMMETRIC)},
    **{("falcon", c): "has no attribute 'weight'" for c in (CT_OLDER, CT_SYMMETRIC)},
    # It has a scaled activation in every layer of these; ours are left out where nothing is scaled, for vLLM.
    **{(f, GEMM): "missing_keys" for f in ("bloom", "falcon", "gpt_neox", "gptj", "mpt", "starcoder2")},
    # Its linears are of a class of their own, which transformers does not replace.
    ("gpt2", GEMM): "has_been_replaced",
    **{("gpt2", c): "missing_keys" for c in PACKED_CT},
    ("gpt2", CT_DEQUANTIZED): "ignore_mismatched_sizes",
    # In transformers since a release that compressed-tensors' environment does not have.
    ("internlm3", CT_OLDER): "does not recognize this architecture",
}
# Read whole, and computed otherwise: GPTQModel's loader puts the outputs of an expert's gate and up side by side for a
# function of transformers that takes them alternately.
DIFFERS = {("gpt_oss", LOADER)}


def grown(value: Any, key: str = "") -> Any:
    """A tiny model's config with the sizes above."""
    if isinstance(value, dict):
        return {k: v if k == "vision_config" else grown(v, k) for k, v in value.items()}
    if key in LONGER:
        return [v for v in value for _ in range(4)]
    if key == "mrope_section":
        return [4 * v for v in value]
    if key == "mlp_only_layers":  # as published: experts in every layer
        return []
    return SIZES.get(key, value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def float_checkpoint(family: str, directory: Path) -> Path:
    """A random model of a family, with a tokenizer that nothing here uses but some loaders want."""
    case = CASES[family]
    if isinstance(case, multimodal.Case):
        config = grown(case.config)
        vision = config["vision_config"]
        for key in ("out_hidden_size", "hidden_size"):  # as wide as the text, where it is the projector's output
            if vision.get(key) == multimodal.TEXT["hidden_size"]:
                config["vision_config"] = vision = vision | {key: SIZES["hidden_size"]}
        model = multimodal.model(dataclasses.replace(case, config=config))
    else:
        model = tiny_checkpoints.randomized(case.family, grown(family_cases.config_of(case)), case.attention)
    if isinstance(case, multimodal.Case) or case.family in torch_references.MODELS:  # drawn for a narrower model
        inner = model if isinstance(model, torch.nn.Module) else getattr(model, "model", None)
        weights = model.weights if inner is None else dict(inner.named_parameters())
        with torch.no_grad():
            for weight in weights.values():
                weight.mul_(0.2 if weight.ndim > 1 else 1.0)
    directory.mkdir(parents=True)
    model.save_pretrained(directory)
    peers.tokenizer().save_pretrained(directory)
    return directory


def packed(leaf: Any, symmetric: bool) -> QuantizedTensor:
    """A kernel ``[..., K, N]`` rounded to 4 bits: float16 scales, zero points unless symmetric."""
    grouped = np.asarray(leaf, np.float64)
    *batch, k, n = grouped.shape
    grouped = grouped.reshape(*batch, k // GROUP, GROUP, n)
    low, high = np.minimum(grouped.min(-2), 0), np.maximum(grouped.max(-2), 0)
    step = np.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
    scales = step.astype(np.float16).astype(np.float32)
    zeros = np.full(scales.shape, 8) if symmetric else np.clip(np.rint(-low / scales), 0, 15)
    codes_ = np.clip(np.rint(grouped / scales[..., None, :]) + zeros[..., None, :], 0, 15).astype(np.uint8)
    words = [codes.pack(one, 4) for one in codes_.reshape(-1, k, n)]
    return QuantizedTensor(
        qweight=jnp.asarray(np.stack(words).reshape(*batch, -1, n)),
        scales=jnp.asarray(scales),
        zeros=None if symmetric else jnp.asarray(zeros, jnp.uint8),
        inv_scale=None,
        bits=4,
        group_size=GROUP,
        axes="b" * len(batch) + "kn",
        k_dims=(k,),
        n_dims=(n,),
        dtype="float32",
    )


def quantized(source: Path, symmetric: bool) -> awq_jax.Model:
    """The model with every linear packed that `awq_jax.Model.quantize` packs, plainly rounded."""
    model = awq_jax.load(source, dtype="float32")
    model.params = paths.map_with_path(
        lambda path, leaf: packed(leaf, symmetric) if TARGETS.search(path) and not KEPT.search(path) else leaf,
        model.params,
    )
    return model


def run(
    names: Sequence[str], work: Path, read_by: Mapping[str, Consumer] = CONSUMERS
) -> dict[str, dict[str, dict[str, Any]]]:
    """What consumers make of some families.

    Returns:
      For each family and consumer ``{"difference": d}``, the largest of the logits relative to the largest, with
      ``"tokens"``, how many differ by more than the tolerance, if any do; or ``{"error": text}``, the consumer's;
      nothing where it is not tried.
    """
    ours: dict[tuple[str, bool], np.ndarray] = {}
    tried: dict[str, list[str]] = {consumer: [] for consumer in read_by}
    for name in names:
        source = float_checkpoint(name, work / "float" / name)
        for symmetric in (False, True):
            model = quantized(source, symmetric)
            experts = any(isinstance(layer.mlp, MoEConfig) for layer in model.config.layers)
            wanted = {k: c for k, c in read_by.items() if c.symmetric == symmetric and (experts or not c.experts)}
            if not wanted:
                continue
            ours[name, symmetric] = np.asarray(model(IDS[None]))[0]
            for consumer, c in wanted.items():
                target = work / f"{c.format}-{symmetric}" / name
                if not target.exists():
                    model.save(target, format=c.format)
                tried[consumer].append(name)
        print("written:", name, flush=True)
    np.save(work / "ids.npy", IDS)
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    for number, (consumer, c) in enumerate(read_by.items()):
        if not tried[consumer]:
            continue
        out = work / f"out-{number}"
        out.mkdir()
        checkpoints = [work / f"{c.format}-{c.symmetric}" / name for name in tried[consumer]]
        peers.drive(c.environment, "read_many.py", c.loader, work / "ids.npy", out, *checkpoints)
        for name in tried[consumer]:
            found[name][consumer] = outcome(out, name, ours[name, c.symmetric], c.tolerance)
        print("read:", consumer, {name: found[name][consumer] for name in tried[consumer]}, flush=True)
    return found


def outcome(out: Path, name: str, ours: np.ndarray, tolerance: float) -> dict[str, Any]:
    """What ``read_many.py`` left about a checkpoint."""
    if (out / f"{name}.txt").exists():
        return {"error": (out / f"{name}.txt").read_text()}
    theirs = np.load(out / f"{name}.npy")
    assert theirs.shape == ours.shape
    by_token = np.abs(theirs - ours).max(axis=1) / np.abs(ours).max()
    beyond = int((~(by_token < tolerance)).sum())
    return {"difference": float(by_token.max())} | ({"tokens": beyond} if beyond else {})


def agrees(result: dict[str, Any], consumer: str) -> bool:
    """Whether a program's logits are ours, but for the tokens that may go to other experts."""
    return "difference" in result and result.get("tokens", 0) <= CONSUMERS[consumer].rerouted


def verdict(result: dict[str, Any], consumer: str) -> str:
    """One cell of the table."""
    if "difference" in result:
        sign = "" if agrees(result, consumer) else "**differs** "
        return f"{sign}{result['difference']:.0e}" + (f" in {n} of {len(IDS)}" if (n := result.get("tokens")) else "")
    text = result["error"].split("\n")[0]
    return text.replace("|", "\\|")[:160]


def page(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The results as a table in Markdown."""
    tolerances = "; ".join(f"{c.tolerance:g} for {name}" for name, c in CONSUMERS.items())
    rows = ["| family | " + " | ".join(CONSUMERS) + " |", "|---" * (1 + len(CONSUMERS)) + "|"]
    for family in sorted(found):
        cells = [verdict(found[family][c], c) if c in found[family] else "" for c in CONSUMERS]
        rows.append(f"| {family} | " + " | ".join(cells) + " |")
    return (
        "# Families in the programs that read their checkpoints\n\n"
        "Made by `AWQ_JAX_INTEROP_ENVS=DIR python tests/interop/consumers.py` with the environments of "
        "`tests/interop/make_envs.sh`. A number is the largest difference of the logits of a small random model, every "
        "linear packed to 4 bits in groups of 32, from those of awq_jax before writing, relative to the largest logit "
        f"(allowed: {tolerances}; GPTQModel's kernels for the CPU round each dequantized weight to float16, and its "
        f"own loader computes all so: there one of the {len(IDS)} tokens may go to another expert). A text is the "
        "program's error. Where a cell is empty the program was not tried: GPTQModel's loader is for families with "
        "experts. The last three columns are transformers 5.24 with compressed-tensors 0.20.1 (`older`: 5.17 with "
        "0.19.0).\n\n" + "\n".join(rows) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", help="all, if none is named")
    environments = sorted({c.environment for c in CONSUMERS.values()})
    parser.add_argument("--environment", choices=environments, help="only the programs of this one")
    args = parser.parse_args()
    names = args.families or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    read_by = {k: c for k, c in CONSUMERS.items() if args.environment in (None, c.environment)}
    with tempfile.TemporaryDirectory() as work:
        found = run(names, Path(work), read_by)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = before | {
        name: {k: v for k, v in before.get(name, {}).items() if k in CONSUMERS} | found[name] for name in names
    }
    RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    RESULTS.with_suffix(".md").write_text(page(rows))


if __name__ == "__main__":
    main()
