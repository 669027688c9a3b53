"""Float checkpoints made of packed ones, family by family, beside what transformers saves and loads.

    python tests/helpers/float_files.py [FAMILY ...]

writes benchmarks/results/float_files.json and float_files.md; with names only their rows are made anew.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import family_cases
import jax.numpy as jnp
import multimodal
import numpy as np
import torch
import torch_references
import transformers
from safetensors.numpy import save_file
from tiny_checkpoints import randomized

from awq_jax import models, paths
from awq_jax.convert import conversion, registry, writing
from awq_jax.convert.arrays import codes
from awq_jax.models.weights import params
from awq_jax.qtensor import QuantizedTensor

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "float_files.json"
FORMATS = ("compressed-tensors", "gemm", "awq-jax")
GROUP = 16
# Not phi3_v and qwen2_5_omni, of whose files most is carried through: see test_carried.py.
CASES: dict[str, Any] = {c.family: c for c in reversed((*family_cases.CASES, *multimodal.CASES))}
TOKENS = torch.arange(3, 15)[None]


def rounded(leaf: Any) -> tuple[QuantizedTensor, np.ndarray]:
    """A kernel ``[..., K, N]`` rounded to 4 bits, and the float32 array that it stands for, in NumPy."""
    *batch, k, n = leaf.shape
    grouped = np.asarray(leaf, np.float64).reshape(*batch, k // GROUP, GROUP, n)
    low, high = np.minimum(grouped.min(-2), 0), np.maximum(grouped.max(-2), 0)
    scales = ((high - low) / 15).astype(np.float16).astype(np.float32)
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    q = np.clip(np.rint(grouped / scales[..., None, :]) + zeros[..., None, :], 0, 15)
    dense = ((q - zeros[..., None, :]) * scales[..., None, :].astype(np.float64)).reshape(leaf.shape)
    words = [codes.pack(one, 4) for one in q.astype(np.uint8).reshape(-1, k, n)]
    packed = QuantizedTensor(
        qweight=jnp.asarray(np.stack(words).reshape(*batch, -1, n)),
        scales=jnp.asarray(scales),
        zeros=jnp.asarray(zeros, jnp.uint8),
        inv_scale=None,
        bits=4,
        group_size=GROUP,
        axes="b" * len(batch) + "kn",
        k_dims=(k,),
        n_dims=(n,),
        dtype="float32",
    )
    return packed, dense.astype(np.float32)


def is_rounded(path: str, shape: tuple[int, ...]) -> bool:
    """Whether the kernel at ``path`` is packed here: linears of layers, not routers."""
    linear = path.startswith("layers/") and path.endswith("/kernel")
    router = path.endswith(("mlp/gate/kernel", "/shared_expert_gate/kernel"))
    return linear and not router and len(shape) in (2, 3) and shape[-2] % GROUP == 0 and shape[-1] % 8 == 0


def row(family: str, work: Path) -> dict[str, Any]:
    """``{"tensors": n, "from": formats, "logits": difference, ...}``, or what went wrong: ``{"error": text}``.

    ``logits`` is relative to the largest, None where transformers does not have the family.
    """
    case = CASES[family]
    if isinstance(case, family_cases.Case):
        theirs = randomized(case.family, family_cases.config_of(case), case.attention)
    else:
        theirs = multimodal.model(case)
    (work / "source").mkdir()
    theirs.save_pretrained(work / "source")
    source = registry.open_source(work / "source")
    config = models.config_of(source)
    state = params.load(source, config, params.abstract(config)[1])
    pairs = {p: rounded(w) for p, w in paths.flatten(state).items() if is_rounded(p, tuple(w.shape))}
    packed = paths.map_with_path(lambda p, w: pairs[p][0] if p in pairs else w, state)
    dense = paths.map_with_path(lambda p, w: jnp.asarray(pairs[p][1]) if p in pairs else w, state)
    carried = {n: source.read(n) for n in source.names() if config.names.carries(n)}
    want = dict(params.tensors(dense, config)) | carried
    problems = []
    done = []
    for format in FORMATS:
        tensors = [*params.tensors(packed, config), *carried.items()]
        if writing.unfit(format, tensors) is not None:
            continue
        writing.write_checkpoint(work / format, tensors, source.config, format, extra=source)
        conversion.checkpoint(work / format, work / f"{format}-float", "float", dtype="float32")
        found = registry.open_source(work / f"{format}-float")
        names = set(found.names())
        problems += [f"{format}: lacks {n}" for n in want.keys() - names] + [
            f"{format}: {n}" for n in names - want.keys()
        ]
        for n in names & want.keys():
            if found.shape(n) != source.shape(n):
                problems.append(f"{format}: {n} is {found.shape(n)}, not {source.shape(n)}")
            elif not np.allclose(np.asarray(found.read(n)), want[n], rtol=1e-5, atol=1e-7):
                problems.append(f"{format}: {n} has other values")
        done.append(format)
    if problems:
        return {"error": "; ".join(sorted(problems)[:3])}
    result: dict[str, Any] = {"tensors": len(want), "packed": len(pairs), "from": done, "logits": None}
    if family in torch_references.MODELS or not hasattr(theirs, "config"):
        return result
    # The dequantized model as transformers' own file, by the names that it saved.
    shutil.copytree(work / "source", work / "dense")
    for file in (work / "dense").glob("*.safetensors*"):
        file.unlink()
    save_file(
        {n: np.asarray(v, order="C") for n, v in want.items()}, work / "dense" / "model.safetensors", {"format": "pt"}
    )
    logits = []
    for directory in (work / "dense", work / f"{done[0]}-float"):
        kind = type(theirs)
        model, info = kind.from_pretrained(
            directory,
            dtype=torch.float32,
            output_loading_info=True,
            attn_implementation=getattr(case, "attention", "eager"),
        )
        faults = {what: sorted(map(str, names))[:2] for what, names in info.items() if names}
        if faults:
            return {"error": f"transformers, {directory.name}: {faults}"}
        with torch.no_grad():
            logits.append(model.eval()(input_ids=TOKENS).logits)
    result["transformers"] = transformers.__version__
    result["logits"] = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    return result


def page(found: dict[str, dict[str, Any]]) -> str:
    """The results as a table in Markdown."""
    rows = ["| family | tensors | of them packed | converted from | logits in transformers |", "|---|---|---|---|---|"]
    for family, r in sorted(found.items()):
        if "error" in r:
            rows.append(f"| {family} | | | | {r['error']} |")
            continue
        logits = "no such family there" if r["logits"] is None else f"{r['logits']:.0e}"
        rows.append(f"| {family} | {r['tensors']} | {r['packed']} | {', '.join(r['from'])} | {logits} |")
    versions = sorted({r["transformers"] for r in found.values() if "transformers" in r})
    return (
        "# Float checkpoints made of packed ones\n\n"
        f"Made by `python tests/helpers/float_files.py` with transformers {', '.join(versions)}: a tiny random "
        "model of each family is rounded to 4 bits, saved, and converted with `--to float --dtype float32`. Its "
        "tensors have the names and shapes that transformers saves (of families it does not have: those of the tests' "
        "references) and the values of the dequantized model; transformers loads them without a missing, unexpected "
        "or mismatched key, and the last column is the largest difference of its logits from those of the dequantized "
        "model, relative to the largest.\n\n" + "\n".join(rows) + "\n"
    )


def run(families: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows by family."""
    found = {}
    for family in families:
        with tempfile.TemporaryDirectory() as work:
            try:
                found[family] = row(family, Path(work))
            except Exception as e:
                found[family] = {"error": f"{type(e).__name__}: {str(e)[:200]}"}
        print(family, found[family], flush=True)
    return found


if __name__ == "__main__":
    chosen = sys.argv[1:]
    rows = json.loads(RESULTS.read_text()) if chosen and RESULTS.exists() else {}
    rows |= run(chosen or sorted(CASES))
    RESULTS.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(rows))
