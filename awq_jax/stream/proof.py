"""A block's plan is seen to keep its output, as that of a whole model is (`awq_jax.plan.verify`)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from awq_jax.plan.plan import Plan, ScaleGroup
from awq_jax.plan.verify import verify
from awq_jax.stream.decoder_blocks import EMBED, Chain, DecoderBlock, Leaves

PROBE = 64  # tokens on which a plan is proven


def refused(
    chain: Chain, block: DecoderBlock, groups: Sequence[ScaleGroup], leaves: Leaves, activations: str | None
) -> dict[str, str]:
    """Groups whose scale is not absorbed after all, by name within the block: why.

    Args:
      groups: of the block, with names within it.
      leaves: its float parameters.
      activations: the dtype of hidden states; None for float32.
    """
    config, plan = chain.config, Plan(tuple(groups))
    rng = np.random.default_rng(0)
    length = min(PROBE, config.max_length)
    probe = rng.integers(0, config.vocab_size, (1, length)).astype(np.int32)
    if block.kind != EMBED:
        # Normal numbers rather than real hidden states: a few of those can be so large that they hide the rest.
        normal = rng.standard_normal((1, length, config.hidden_size)).astype(np.float32)
        probe = normal.astype(jnp.dtype(activations or "float32"))  # by NumPy: XLA would compile a program for it
    proven = verify(plan, chain.apply(block), dict(leaves), probe)
    return {
        new.name: new.reason
        for old, new in zip(plan.groups, proven.groups, strict=True)
        if old.is_folded and not new.is_folded
    }
