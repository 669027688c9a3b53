"""Models on simulated devices against the same models on one: run by test_tensor_parallel in a process of its own.

``python mesh_cases.py GROUP DIRECTORY`` prints one JSON object of what each case of a group gave.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from quant_helpers import random_like

import awq_jax
from awq_jax import models, paths
from awq_jax.convert.files import slices
from awq_jax.models.mesh import sharding
from awq_jax.models.weights import fuse
from awq_jax.models.weights import params as model_params
from awq_jax.qtensor import is_quantized
from awq_jax.serve.sampling import Draws, Sampling
from awq_jax.serve.served_weights import ServedWeights

TOKENS = np.random.default_rng(0).integers(0, 60, (2, 9)).astype(np.int32)
PROMPTS = [[3, 7, 1, 9], [5]]
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MOE = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
MOE |= {"shared_expert_intermediate_size": 128, "mlp_only_layers": [], "num_hidden_layers": 1}
LATENT = {"num_key_value_heads": 8, "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16}
LATENT |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2}
LATENT |= {"moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LATENT |= {"n_shared_experts": 1, "routed_scaling_factor": 1.5}
DELTA = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
DELTA |= {
    "num_hidden_layers": 2,
    "linear_conv_kernel_dim": 4,
    "head_dim": 16,
    "layer_types": ["full_attention", "linear_attention"],
}

# name: (family, devices, changed keys, group size; 0 for a float model)
CASES: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "llama-4": ("llama", 4, {"attention_bias": True}, 16),
    "moe-8": ("qwen2_moe", 8, MOE, 16),
    "llama-2": ("llama", 2, {"tie_word_embeddings": True}, 64),
    "llama-8": ("llama", 8, {}, 16),
    "llama-float-4": ("llama", 4, {}, 0),
    "odd-groups": ("llama", 8, {"intermediate_size": 192, "vocab_size": 97}, 32),
    "odd-heads": ("llama", 8, {"num_attention_heads": 4, "head_dim": 32}, 32),
    "moe-2": ("qwen2_moe", 2, MOE, 32),
    "moe-float-4": ("qwen2_moe", 4, MOE, 0),
    "phi3-4": ("phi3", 4, {}, 16),
    "phi3-8": ("phi3", 8, {}, 16),
    "phi3-float-4": ("phi3", 4, {}, 0),
    "gpt_neox-4": ("gpt_neox", 4, {"num_key_value_heads": None}, 16),
    "bloom-8": ("bloom", 8, {"n_head": 8, "n_layer": 2}, 16),
    "mla-4": ("deepseek_v3", 4, LATENT, 16),
    "mla-8": ("deepseek_v3", 8, LATENT, 16),
    "qwen3_next-4": ("qwen3_next", 4, MOE | DELTA, 16),
    "olmo2-8": ("olmo2", 8, {}, 16),
    "gemma2-4": ("gemma2", 4, {"tie_word_embeddings": True, "head_dim": 16, "sliding_window": 5}, 16),
}
GROUPS = {"quick": list(CASES)[:2], "more": list(CASES)[2:]}


def decoder(family: str, changes: dict[str, Any], group: int) -> tuple[Any, Any, Any]:
    """Config, static part and random parameters, those of the layers packed."""
    config = models.config_from_hf({"model_type": family} | SIZES | changes)
    graphdef, state = model_params.abstract(config)
    rng = np.random.default_rng(0)

    def leaf(path: str, like: Any) -> Any:
        packs = path.startswith("layers") and path.endswith("/kernel") and "gate/" not in path
        if group and packs and like.shape[-2] % group == 0 and like.shape[-1] % 8 == 0:
            axes = "bkn" if len(like.shape) == 3 else "kn"
            like = jax.ShapeDtypeStruct(like.shape, jnp.float32)
            return random_like(like, axes, group_size=group, seed=int(rng.integers(1 << 30)))
        return jnp.asarray(rng.normal(size=like.shape) * 0.2, jnp.float32)

    return config, graphdef, paths.map_with_path(leaf, state)


def placed(config: Any, params: Any, devices: int) -> Any:
    """The same parameters on a mesh."""
    where = sharding.shardings(config, params, devices)
    leaves = map(jax.device_put, jax.tree.leaves(params), jax.tree.leaves(where))
    return jax.tree.unflatten(jax.tree.structure(where), leaves)


def apart(a: Any, b: Any) -> float:
    """Largest difference relative to the largest value."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def collectives(text: str) -> list[str]:
    """``"all-reduce f32[2,128]"`` for each collective of a compiled program."""
    found = re.findall(r"= (.*?) (all-[a-z]+|collective-[a-z]+|reduce-scatter)\(", text)
    return [f"{kind} {re.sub(r'{[^}]*}', '', shape)}" for shape, kind in found]


def step_text(generator: Any, params: Any) -> str:
    """The compiled program of one decoding step of two rows."""
    lengths = np.array([9, 9], np.int32)
    arguments = (
        params,
        np.pad(TOKENS, ((0, 0), (0, 7))),
        lengths,
        Draws(),
        None,
    )  # as `run` pads, which has compiled this
    cache = generator.compiled(generator.prefill, *arguments, slots=64)(*arguments)[2]
    return generator.step.lower(params, cache, Draws(), TOKENS[:, 0], lengths).compile().as_text()


def case(name: str) -> dict[str, Any]:
    """One model on one device and on some."""
    family, devices, changes, group = CASES[name]
    config, graphdef, params = decoder(family, changes, group)
    one = ServedWeights(graphdef, config, params, merge_linears=False, copy=False)
    want = one.as_held()[0].forward(params, TOKENS)
    said = one.as_held()[0].run(params, PROMPTS, max_new_tokens=6, sampling=Sampling())
    there = placed(config, params, devices)
    many = ServedWeights(graphdef, config, there, copy=False, place=sharding.on(devices))
    generator, served = many.serving()
    answers = generator.run(served, PROMPTS, max_new_tokens=6, sampling=Sampling())
    text = step_text(generator, served)
    out: dict[str, Any] = {
        "logits": apart(generator.forward(served, TOKENS), want),
        "said": said == answers,
        "collectives": dict(collections.Counter(collectives(text))),
        "unmerged": len([g for g in fuse.fusable(generator.config) if "experts" not in g.module]),
        "how": many.explain(),
    }
    back = many.take_params()
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), back, there)
    out["back"] = all(jax.tree.leaves(same)) and jax.tree.structure(back) == jax.tree.structure(there)
    if name not in GROUPS["quick"]:
        out["kept_logits"] = apart(many.as_held()[0].forward(back, TOKENS), want)
    leaves = {path: sharding.Leaf.of(leaf) for path, leaf in paths.flatten(params).items()}
    cuts = sharding.rule(config, leaves, devices)
    out["explained"] = sharding.explain(leaves, cuts, devices)
    first = jax.devices()[0]
    held = [s.data.nbytes for a in jax.tree.leaves(there) for s in a.addressable_shards if s.device == first]
    out["bytes"] = [sum(held), sharding.per_device(leaves, cuts, devices), paths.nbytes(params)]
    if name == "llama-4":  # what the test of collectives must see: weights that are gathered
        kernel = paths.flatten(there)["layers/0/mlp/up_proj/kernel"]
        unplaced = dataclasses.replace(kernel, placement=None)
        everywhere = sharding.on(devices).sharding(jax.sharding.PartitionSpec())
        product = jax.jit(lambda x, q: awq_jax.dot(x, jax.lax.with_sharding_constraint(q, everywhere)))
        text = product.lower(jnp.ones((2, kernel.k)), unplaced).compile().as_text()
        out["control"] = collectives(text)
    return out


def load(directory: Path) -> dict[str, Any]:
    """Every checkpoint of a directory, loaded on one device and onto some."""
    out: dict[str, Any] = {}
    read: list[str] = []
    plain = slices.cut

    def counted(value: Any, index: Any) -> Any:
        read.append("a whole weight")
        return plain(value, index)

    slices.cut = counted
    for path in sorted(directory.iterdir()):
        one = awq_jax.load(path, resident=False, merge=False)
        want = one(TOKENS)
        said = one.generator.run(one.params, PROMPTS, max_new_tokens=6, sampling=Sampling())
        whole = paths.flatten(one.params)
        for devices in (2, 4, 8):
            read.clear()
            many = awq_jax.load(path, mesh=devices)
            whole_reads = sorted(n for n in read if n.endswith("weight") and "norm" not in n)
            same = []
            for leaf_path, leaf in paths.flatten(many.params).items():
                pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(whole[leaf_path]), strict=True)
                same += [a.dtype == b.dtype and bool((np.asarray(a) == np.asarray(b)).all()) for a, b in pairs]
            weights, served = many._weights.serving()
            out[f"{path.name}-{devices}"] = {
                "same": all(same),
                "packed": sum(map(is_quantized, whole.values())),
                "whole_reads": whole_reads,
                "logits": apart(weights.forward(served, TOKENS), want),
                "said": said == weights.run(served, PROMPTS, max_new_tokens=6, sampling=Sampling()),
            }
    return out


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    group, directory = sys.argv[1:]
    print(json.dumps(load(Path(directory)) if group == "load" else {name: case(name) for name in GROUPS[group]}))
