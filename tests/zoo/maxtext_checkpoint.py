"""examples/maxtext_app.py on a tiny checkpoint that MaxText saves: what it decoded, and what the whole model makes."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from maxtext.common.checkpointing import save_params_to_path
from maxtext_models import BASE, TINY, maxtext_model
from measure import tokens, uneven

import awq_jax

NEW = 6

if __name__ == "__main__":
    work = Path(sys.argv[1])
    settings = {"decoder_block": "llama2"}
    made = maxtext_model(settings, {})
    params = uneven(made.params)
    save_params_to_path(str(work / "float"), {"params": nnx.to_pure_dict(params)})
    app = Path(__file__).parents[2] / "examples" / "maxtext_app.py"
    spec = importlib.util.spec_from_file_location("maxtext_app", app)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = f"load_parameters_path={work / 'float' / 'items'}"
    arguments = [BASE, path, *(f"{k}={v}" for k, v in (TINY | settings).items())]
    batches = [np.asarray(tokens(seed)) for seed in range(2)]
    decoded = module.main(work / "packed", arguments, batches, NEW)
    # All tokens at once with the stored tree is what decoding one by one must agree with.
    packed = awq_jax.convert.restore(work / "packed", like=made.params)
    leaves = jax.tree.leaves(packed, is_leaf=awq_jax.qtensor.is_quantized)
    count = sum(isinstance(a, awq_jax.QuantizedTensor) for a in leaves)
    ids = [int(i) for i in batches[0][0][:8]]
    for _ in range(NEW):
        logits = awq_jax.bind(made.fn)(packed, jnp.asarray([ids], jnp.int32))
        ids.append(int(logits[0, -1].argmax()))
    print(json.dumps({"decoded": decoded, "whole": ids[8:], "packed": count}))
