"""Blocks of every family cut at the inputs of their groups: traced, nothing is computed."""

import family_cases
import jax
import jax.numpy as jnp
import pytest
import transformers

from awq_jax import models
from awq_jax.config import AwqConfig
from awq_jax.stream.cut_blocks import Programs
from awq_jax.stream.decoder_blocks import renamed
from awq_jax.stream.session import Session

# Of the last layer, by the linears that read an input first: whether the inputs of both streams can be compared, and
# whether results are added to the stream.
CUTS = {
    "llama": {"q_proj": "alone", "o_proj": "added", "gate_proj": "alone", "down_proj": "added"},
    "gemma2": {"q_proj": "alone", "o_proj": "alone", "gate_proj": "alone", "down_proj": "alone"},  # norms in between
    "qwen3_moe": {"q_proj": "alone", "o_proj": "added", "gate": "alone", "experts/down_proj": "by expert"},
    "deepseek_v3": {
        "q_a_proj": "alone", "q_b_proj": "alone", "kv_b_proj": "alone", "o_proj": "added", "gate": "alone",
        "experts/down_proj": "by expert", "down_proj": "added",
    },
    "phi": {"q_proj": "alone", "o_proj": "alone", "down_proj": "added"},  # added to what o_proj made
}  # fmt: skip
FAMILIES = [c.name for c in family_cases.CASES if c.name == c.family and c.family in transformers.CONFIG_MAPPING]


def cuts(family: str) -> dict[str, str]:
    case = next(c for c in family_cases.CASES if c.name == family)
    config = models.config_from_hf(
        transformers.AutoConfig.for_model(case.family, **family_cases.config_of(case)).to_dict()
    )
    session = Session(config, AwqConfig(group_size=-1, explicit_scale=False, on_indivisible="float"))
    block = [b for b in session.blocks if b.name.startswith("layers/")][-1]
    groups = [renamed(g, block.prefix, "") for g, _ in session.work(block)]
    leaves = {p: jax.ShapeDtypeStruct(shape, jnp.float32) for p, shape in block.leaves.items()}
    x = jax.ShapeDtypeStruct((2, 8, config.hidden_size), jnp.float32)
    programs = Programs(session.chain.apply(block), leaves, x, groups)
    found, alive = {}, [x]
    for i, group in enumerate(groups):
        alive = jax.eval_shape(lambda p, a, i=i: programs.segments.run(i, p, a), leaves, alive)
        name = group.name.removesuffix("/kernel").split("/")
        found["/".join(name[-2:]) if "experts" in name[-2] else name[-1]] = (
            "by expert" if not programs.paired(i) else "added" if programs.widths(i) else "alone"
        )
        read = jax.eval_shape(lambda a, i=i: programs.segments.input_of(i, a), alive)
        assert read.shape[-1] == group.channels
    (y,) = jax.eval_shape(lambda p, a: programs.segments.run(len(groups), p, a), leaves, alive)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    return found


@pytest.mark.parametrize("family", CUTS)
def test_what_is_read_and_what_results_are_added_to(family):
    found = cuts(family)
    assert found == CUTS[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_cut(family):
    assert cuts(family)
