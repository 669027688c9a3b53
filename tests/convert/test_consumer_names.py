"""What vLLM's loaders look for in a checkpoint, as data, against the names and exceptions that we write.

vLLM needs CUDA, so its rules are stated here, from its source (2025 and 2026, vllm/model_executor):
``models/*.py`` for the linears of each family and what they are made of in files (``packed_modules_mapping`` and
``load_weights``), ``layers/quantization/utils/quant_utils.py`` (``is_layer_skipped``) and ``awq_marlin.py`` for AWQ,
``layers/quantization/compressed_tensors/utils.py`` and ``compressed_tensors_moe`` for compressed-tensors.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import family_cases
import pytest
import torch_references
from transformers import AutoConfig

from awq_jax import models, paths
from awq_jax.convert import registry
from awq_jax.convert.format import Destination, Record
from awq_jax.convert.formats import compressed_tensors_config, joined_linears
from awq_jax.convert.writing import final_config
from awq_jax.models.weights import params

QKV = "self_attn.qkv_proj=q_proj,k_proj,v_proj"
ATTENTION = f"{QKV} self_attn.o_proj"
GATED = "mlp.gate_up_proj=gate_proj,up_proj mlp.down_proj"
BLOOM = "query_key_value dense"
FOUR_H = "mlp.dense_h_to_4h mlp.dense_4h_to_h"
SHARED = "mlp.{}.gate_up_proj=gate_proj,up_proj mlp.{}.down_proj"
MLA = "self_attn.q_b_proj self_attn.kv_b_proj self_attn.o_proj"
JOINED_MLA = f"self_attn.fused_qkv_a_proj=q_a_proj,kv_a_proj_with_mqa {MLA}"
GATE_UP_DOWN = ("gate_proj", "down_proj", "up_proj")
W123 = ("w1", "w2", "w3")


@dataclasses.dataclass(frozen=True)
class Loader:
    """A family's model in vLLM.

    Attributes:
      layers: prefix of its layers in files.
      linears: of a layer, each with what it is joined from (``name=part,part``) if it is.
      experts: prefix of a layer's ``FusedMoE``.
      parts: what its experts' linears are called in files: gate, down, up.
    """

    layers: str
    linears: str
    experts: str = ""
    parts: tuple[str, ...] = GATE_UP_DOWN


LLAMA = Loader("model.layers", f"{ATTENTION} {GATED}")
LOADERS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "cohere": LLAMA,
    "olmo2": LLAMA,
    "exaone4": LLAMA,
    "minicpm": LLAMA,
    "stablelm": LLAMA,
    "phi3": Loader("model.layers", "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),
    "glm4": Loader("model.layers", f"{ATTENTION} mlp.gate_up_proj mlp.down_proj"),
    "phi": Loader("model.layers", f"{QKV} self_attn.dense mlp.fc1 mlp.fc2"),
    "starcoder2": Loader("model.layers", f"{ATTENTION} mlp.c_fc mlp.c_proj"),
    "nemotron": Loader("model.layers", f"{ATTENTION} mlp.up_proj mlp.down_proj"),
    "opt": Loader("model.decoder.layers", f"{QKV} self_attn.out_proj fc1 fc2"),
    "falcon": Loader("transformer.h", f"self_attention.query_key_value self_attention.dense {FOUR_H}"),
    "bloom": Loader("transformer.h", f"self_attention.query_key_value self_attention.dense {FOUR_H}"),
    "gpt_neox": Loader("gpt_neox.layers", f"attention.query_key_value attention.dense {FOUR_H}"),
    "mpt": Loader("transformer.blocks", "attn.Wqkv attn.out_proj ffn.up_proj ffn.down_proj"),
    "gpt2": Loader("transformer.h", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    "gpt_bigcode": Loader("transformer.h", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    "gptj": Loader("transformer.h", "attn.qkv_proj=q_proj,k_proj,v_proj attn.out_proj mlp.fc_in mlp.fc_out"),
    "qwen": Loader("transformer.h", "attn.c_attn attn.c_proj mlp.gate_up_proj=w2,w1 mlp.c_proj"),
    "baichuan": Loader("model.layers", f"self_attn.W_pack self_attn.o_proj {GATED}"),
    "internlm2": Loader("model.layers", "attention.wqkv attention.wo feed_forward.gate_up_proj=w1,w3 feed_forward.w2"),
    "exaone": Loader(
        "transformer.h",
        "attn.attention.qkv_proj=q_proj,k_proj,v_proj attn.attention.out_proj "
        "mlp.gate_up_proj=c_fc_0,c_fc_1 mlp.c_proj",
    ),
    "minicpm3": Loader("model.layers", f"self_attn.q_a_proj self_attn.kv_a_proj_with_mqa {MLA} {GATED}"),
    "mixtral": Loader("model.layers", ATTENTION, "block_sparse_moe.experts", W123),
    "phimoe": Loader("model.layers", ATTENTION, "block_sparse_moe.experts", W123),
    "granitemoe": Loader("model.layers", ATTENTION, "block_sparse_moe.experts"),
    "granitemoeshared": Loader(
        "model.layers", f"{ATTENTION} shared_mlp.input_linear shared_mlp.output_linear", "block_sparse_moe.experts"
    ),
    "olmoe": Loader("model.layers", ATTENTION, "mlp.experts"),
    "qwen2_moe": Loader(
        "model.layers", f"{ATTENTION} {GATED} {SHARED.format('shared_expert', 'shared_expert')}", "mlp.experts"
    ),
    "qwen3_moe": Loader("model.layers", f"{ATTENTION} {GATED}", "mlp.experts"),
    "qwen3_next": Loader(
        "model.layers",
        f"{ATTENTION} linear_attn.in_proj_qkvz linear_attn.in_proj_ba linear_attn.out_proj "
        f"{SHARED.format('shared_expert', 'shared_expert')}",
        "mlp.experts",
    ),
    "glm4_moe": Loader(
        "model.layers", f"{ATTENTION} {GATED} {SHARED.format('shared_experts', 'shared_experts')}", "mlp.experts"
    ),
    "deepseek_v2": Loader(
        "model.layers", f"{JOINED_MLA} {GATED} {SHARED.format('shared_experts', 'shared_experts')}", "mlp.experts"
    ),
    "deepseek_v3": Loader(
        "model.layers", f"{JOINED_MLA} {GATED} {SHARED.format('shared_experts', 'shared_experts')}", "mlp.experts"
    ),
}
MOE = [name for name, loader in LOADERS.items() if loader.experts]


def records(family: str, keep: Callable[[str], bool] = lambda path: False, **packing: Any) -> list[Record]:
    """What is written of a tiny model: linears packed, but the head, routers, and paths that ``keep`` names."""
    case = next(c for c in family_cases.CASES if c.family == family)
    hf = family_cases.config_of(case) | {"model_type": family}
    if family not in torch_references.MODELS:
        hf = AutoConfig.for_model(**hf).to_dict()
    config = models.config_from_hf(hf)
    leaves = {p: tuple(leaf.shape) for p, leaf in paths.flatten(params.abstract(config)[1]).items()}

    def quantized(path: str) -> bool:
        float_ = path.endswith(("mlp/gate/kernel", "/shared_expert_gate/kernel")) or keep(path)
        return path.startswith("layers/") and path.endswith("/kernel") and not float_

    around = {path.rsplit("/", 2)[0] for path in leaves if quantized(path)}
    out = {}
    for path, shape in leaves.items():
        how = params.stored(config.names, path, shape, path.rsplit("/", 2)[0] in around)
        for name in how.names:
            bits = {"bits": 4, "group_size": 16, "symmetric": True} | packing if quantized(path) else {}
            out[name] = Record(name, how.shape, "float16", **bits)
    return list(out.values())


def written(format: str, found: Sequence[Record]) -> dict[str, Any]:
    """The ``quantization_config``."""
    encoder = registry.get(format).encoder
    assert encoder is not None
    return (encoder(Destination()).config(found) or {})["quantization_config"]


def layers_of(loader: Loader, found: Iterable[Record]) -> list[str]:
    """Prefixes of the layers."""
    hits = (re.match(rf"{re.escape(loader.layers)}\.\d+\.", r.name) for r in found)
    return sorted({hit[0] for hit in hits if hit})


def parts_of(linear: str) -> tuple[str, list[str]]:
    """``a.b=c,d`` -> ``a.b`` and ``[a.c, a.d]``; ``a.b`` -> itself and ``[a.b]``."""
    name, _, parts = linear.partition("=")
    stem = name.rpartition(".")[0]
    return name, [f"{stem}.{p}" for p in parts.split(",")] if parts else [name]


# vLLM's rules.


def awq_skips(modules: Sequence[str], module: str) -> bool:
    """``modules_to_not_convert``: anywhere in the name."""
    return any(m in module for m in modules)


def ct_ignores(targets: Sequence[str], module: str) -> bool:
    """``ignore`` and ``targets``: the whole name, or a pattern that matches its beginning."""
    return any(re.match(t[3:], module) is not None if t.startswith("re:") else t == module for t in targets)


def skipped(
    loader: Loader, layer: str, found: Iterable[Record], skips: Callable[[Sequence[str], str], bool], names: Any
) -> dict[str, bool]:
    """For each of vLLM's linears that a layer has whether it is float; it refuses one of which a part is."""
    out = {}
    there = {r.module for r in found}
    for linear in loader.linears.split():
        name, parts = parts_of(linear)
        if layer + parts[0] not in there:
            continue
        answers = {skips(names, layer + p) for p in parts}
        assert len(answers) == 1, f"vLLM refuses {layer}{name}: some of its parts are float"
        out[name] = answers.pop()
    return out


def ct_float_experts(loader: Loader, layer: str, ignore: Sequence[str]) -> bool:
    """compressed-tensors' ``get_moe_method`` asks for these names in every family, whatever the files call them."""
    answers = {ct_ignores(ignore, f"{layer}{loader.experts}.0.{part}") for part in GATE_UP_DOWN}
    assert len(answers) == 1
    return answers.pop()


@pytest.mark.parametrize("family", LOADERS)
def test_vllm_finds_what_it_joins_and_skips_nothing_packed(family):
    loader, found = LOADERS[family], records(family)
    gemm, ct = written("gemm", found), written("compressed-tensors", found)
    left = {r.module for r in found if r.bits}
    layers = layers_of(loader, found)
    assert len(layers) == 2
    for layer in layers:
        float_awq = skipped(loader, layer, found, awq_skips, gemm["modules_to_not_convert"] or [])
        float_ct = skipped(loader, layer, found, ct_ignores, ct["ignore"])
        for linear in loader.linears.split():
            name, parts = parts_of(linear)
            there = [layer + p in left for p in parts]
            assert all(there) or not any(there), f"{layer}{name} is joined of {parts}"
            if all(there):
                assert not float_awq[name]
                assert not float_ct[name]
            left -= {layer + p for p in parts}
        if loader.experts:
            experts = {m for m in left if m.startswith(f"{layer}{loader.experts}.")}
            names = {m.removeprefix(f"{layer}{loader.experts}.") for m in experts}
            count = len(names) // 3
            assert names == {f"{e}.{p}" for e in range(count) for p in loader.parts}
            assert not awq_skips(gemm["modules_to_not_convert"], f"{layer}{loader.experts}")
            assert not ct_float_experts(loader, layer, ct["ignore"])
            left -= experts
    assert not left, f"vLLM has no linear for {sorted(left)}"
    assert joined_linears.mismatches(found) == []


@pytest.mark.parametrize("family", MOE)
def test_vllm_is_told_of_float_experts(family):
    """One name covers them for AWQ; for compressed-tensors a pattern, as its names are not the files'."""
    loader, found = LOADERS[family], records(family, keep=lambda path: "/experts/" in path)
    assert not any(r.bits for r in found if ".experts." in r.name)
    gemm, ct = written("gemm", found), written("compressed-tensors", found)
    with_experts = {r.name.partition(loader.experts.rpartition(".")[0])[0] for r in found if _of_expert(r.name)}
    assert with_experts
    for layer in with_experts:
        assert awq_skips(gemm["modules_to_not_convert"], f"{layer}{loader.experts}")
        assert ct_float_experts(loader, layer, ct["ignore"])
        assert not any(skipped(loader, layer, found, ct_ignores, ct["ignore"]).values())
    settings = compressed_tensors_config.parse({"quantization_config": ct})
    for r in found:
        if r.bits:
            settings.of(r.module)


def test_what_looks_at_images_is_float_under_either_name():
    """Files of Qwen2-VL say ``visual``, transformers 5 calls that ``model.visual``."""
    found = [Record(f"{name}.weight", (32, 32), "float16") for name in ("visual.blocks.0.attn.qkv", "visual.merger.0")]
    found += [Record(f"model.layers.0.{n}.weight", (32, 32), "float16", 4, 16, True) for n in ("o_proj", "visual_proj")]
    config = written("compressed-tensors", [*found, Record("lm_head.weight", (64, 32), "float16")])
    for name in ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv", "model.visual.merger.0", "lm_head"):
        assert ct_ignores(config["ignore"], name)
    settings = compressed_tensors_config.parse({"quantization_config": config})
    for r in found[2:]:
        assert not ct_ignores(config["ignore"], r.module)
        assert settings.of(r.module).bits == 4
    for family in ("llama", "gpt2", "opt", "deepseek_v3", "granitemoe"):
        assert not [n for n in written("compressed-tensors", records(family))["ignore"] if n.startswith("re:")]


def test_a_router_that_transformers_renames_is_float_there_too():
    """PhiMoE's is a linear of transformers, and so would be packed unless it is ignored under its name there."""
    found = records("phimoe")
    ignore = written("compressed-tensors", found)["ignore"]
    for layer in layers_of(LOADERS["phimoe"], found):
        assert ct_ignores(ignore, f"{layer}block_sparse_moe.gate")
        assert ct_ignores(ignore, f"{layer}mlp.router")


def _of_expert(name: str) -> bool:
    return ".experts." in name or "block_sparse_moe.input_linear" in name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_vllm_finds_the_packing_of_experts_of_other_bits(family):
    """Targets by name would name linears as the files do; a pattern is found under vLLM's names for them, too."""
    loader = LOADERS[family]
    found = [dataclasses.replace(r, bits=8) if ".experts." in r.name and r.bits else r for r in records(family)]
    groups = written("compressed-tensors", found)["config_groups"].values()
    (experts,) = (g["targets"] for g in groups if g["weights"]["num_bits"] == 8)
    (rest,) = (g["targets"] for g in groups if g["weights"]["num_bits"] == 4)
    asked = [f"{layer}{loader.experts}.0.{p}" for layer in layers_of(loader, found) for p in GATE_UP_DOWN]
    packed_layers = {m["layer"] for r in found if r.bits and (m := joined_linears.EXPERT.fullmatch(r.module))}
    asked = [a for a in asked if a.rpartition(".0.")[0] in packed_layers]
    assert asked
    assert all(ct_ignores(experts, a) and not ct_ignores(rest, a) for a in asked)
    assert len(experts) == len(packed_layers)  # one for each layer, not one for each linear
    settings = compressed_tensors_config.parse({"quantization_config": written("compressed-tensors", found)})
    assert all(settings.of(r.module).bits == r.bits for r in found if r.bits)


@pytest.mark.parametrize(
    ("family", "path", "names"),
    [
        ("llama", "layers/1/self_attn/k_proj/kernel", "layers.1.self_attn.k_proj"),
        ("llama", "layers/0/mlp/gate_proj/kernel", "layers.0.mlp.gate_proj"),
        ("deepseek_v3", "layers/0/self_attn/q_a_proj/kernel", "layers.0.self_attn.q_a_proj"),
        ("qwen", "layers/0/mlp/up_proj/kernel", "h.0.mlp.w1"),
        ("mixtral", "layers/0/mlp/experts/down_proj/kernel", "layers.0.block_sparse_moe.experts.0.w2"),
    ],
)
@pytest.mark.parametrize("other", [{}, {"bits": 8}, {"group_size": 32}, {"symmetric": False}], ids=str)
def test_a_torn_group_is_told(family, path, names, other, caplog):
    """A float part, or one of another packing, of what vLLM joins: written as asked, with a warning that names it."""
    kept = records(family, keep=lambda p: p == path)
    changed = {r.name: dataclasses.replace(r, **other) for r in records(family)}
    found = [changed[r.name] if other and not r.bits and changed[r.name].bits else r for r in kept]
    with caplog.at_level(logging.WARNING):
        final_config({}, {"quantization_config": {}}, found)
    assert sum(names in line for line in caplog.messages) == 1
    assert all("vLLM joins" in line for line in caplog.messages)
    assert ("float" in caplog.text) == (not other)


def test_formats_that_no_loader_joins_are_silent(caplog):
    found = records("llama", keep=lambda p: p.endswith("k_proj/kernel"))
    final_config({}, {"quantization": {}}, found)
    final_config({}, None, found)
    assert caplog.messages == []
