"""What a gradient needs beside the packed weights: never the floats of more than one, with the tile that is shipped."""

import jax
import pytest

import awq_jax

K, LAYERS = 512, 6


def plain(p, x):
    for w in p:
        x = jax.nn.silu(x @ w)
    return x


def rematerialized(p, x):
    for w in p:
        x = jax.checkpoint(lambda x, w: jax.nn.silu(x @ w))(x, w)
    return x


# With the optimizations that the default run leaves out.
AS_USERS_COMPILE = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@pytest.mark.parametrize("impl", ["auto", "xla"])
@pytest.mark.parametrize("model", [plain, rematerialized])
def test_no_dequantized_weight_waits_for_the_backward_pass(model, impl):
    params = [jax.random.normal(jax.random.key(i), (K, K)) / K**0.5 for i in range(LAYERS)]
    x = jax.random.normal(jax.random.key(9), (64, K))
    settings = {"bits": 4, "group_size": 128, "method": "rtn", "quantize_head": True, "progress": False}
    packed = awq_jax.quantize(params, [x], apply_fn=plain, **settings)

    def temporaries(apply, p):
        run = jax.jit(jax.grad(lambda x, p: apply(p, x).sum()))
        return run.lower(x, p).compile(AS_USERS_COMPILE).memory_analysis().temp_size_in_bytes

    extra = temporaries(awq_jax.bind(model, impl=impl), packed) - temporaries(model, params)
    assert extra <= 1.1 * K * K * 4  # 0.8 with the code generators that the default run leaves out, too
