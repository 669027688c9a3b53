"""Log-probabilities of several checkpoints by the flax_nnx models of vLLM's JAX engine, or the error of each.

    python read_tpu_inference.py PLUGIN DEVICES DTYPE IDS.npy OUT CHECKPOINT...

PLUGIN is ``yes`` (awq_jax's is registered, as vLLM would) or ``no``. The engine's configuration, model, loader and
quantization are its own; attention, which it has for TPUs only, is plain here. Writes OUT/NAME.npy [T, V] float32 and
OUT/NAME.json, the bytes of the parameters and of the compiled program; or OUT/NAME.txt: the error.
"""

import json
import os
import sys
import traceback
import types
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[2]}"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open


def attention(kv_cache, q, k, v, metadata, mesh, head_dim_original=None, **kwargs):
    """Causal, of one sequence from its first token; queries [T, N, H], keys and values [T, K, H]."""
    heads, kv = q.shape[1], k.shape[1]
    k, v = (jnp.repeat(a, heads // kv, axis=1) for a in (k, v))
    scores = jnp.einsum("tnh,snh->nts", q, k, preferred_element_type=jnp.float32) * head_dim_original**-0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -jnp.inf)
    return kv_cache, jnp.einsum("nts,snh->tnh", jax.nn.softmax(scores, -1).astype(v.dtype), v)


def model_of(path: Path, dtype: str):
    """The engine's function of a step, of logits, and its parameters."""
    import tpu_inference.models.common.model_loader as loader

    pictures = types.ModuleType("tpu_inference.models.jax.gemma4_mm")  # imports torchvision, which is not installed
    pictures.Gemma4ForConditionalGeneration = None
    sys.modules[pictures.__name__] = pictures
    import tpu_inference.models.jax.llama3 as llama3
    import tpu_inference.models.jax.qwen2 as qwen2
    import tpu_inference.models.jax.qwen3 as qwen3
    from tpu_inference.distributed import jax_parallel_state
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config

    for module in (llama3, qwen2, qwen3):
        module.attention = attention
    jax_parallel_state.init_pp_distributed_environment("127.0.0.1", 0, 1, jax.devices()[0], need_pp=False)
    # What it says of AWQ is float16 and bfloat16; what is computed in is set below, as the engine does.
    asked = ModelConfig(model=str(path), dtype="float16", max_model_len=64, skip_tokenizer_init=True)
    config = VllmConfig(model_config=asked)
    shape = (1, len(jax.devices()))
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"))
    with set_current_vllm_config(config), jax.set_mesh(mesh):
        architecture = loader._get_model_architecture(config.model_config.hf_config)
        config.model_config.dtype = jnp.dtype(dtype)
        config.quant_config = loader.get_tpu_quantization_config(config)
        return loader._get_nnx_model(architecture, config, jax.random.key(0), mesh), mesh, config


def run(path: Path, dtype: str, tokens: np.ndarray) -> tuple[np.ndarray, dict]:
    from flax import nnx
    from tpu_inference.layers.common.attention_metadata import AttentionMetadata
    from vllm.config import set_current_vllm_config

    model, mesh, config = model_of(path, dtype)
    graph, state = nnx.split(model)
    count = len(tokens)
    metadata = AttentionMetadata(input_positions=jnp.arange(count), block_tables=None, seq_lens=jnp.array([count]))
    layers = config.model_config.hf_config.num_hidden_layers

    def step(state, ids):
        model = nnx.merge(graph, state)
        found = model(
            [jnp.zeros(())] * layers, ids, metadata, None, metadata.input_positions, None, None, None, True, True
        )
        return jax.nn.log_softmax(model.compute_logits(found[1]).astype(jnp.float32))

    with set_current_vllm_config(config), jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(state, jnp.asarray(tokens)).compile()
        table = np.asarray(compiled(state, jnp.asarray(tokens)))
    memory = compiled.memory_analysis()
    linears = [
        (k, v) for k, v in nnx.to_flat_state(state) if not {"embed_tokens", "lm_head", "embed"} & set(map(str, k))
    ]
    arrays = [jax.tree.leaves(v)[0] for _, v in linears]
    stored = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "np") as f:
            for name in f.keys():  # noqa: SIM118
                if not any(part in name for part in ("embed", "lm_head", "weight_shape")):
                    piece = f.get_slice(name)
                    stored += (
                        int(np.prod(piece.get_shape())) * {"I32": 4, "F16": 2, "BF16": 2, "F32": 4}[piece.get_dtype()]
                    )
    kinds = sorted({str(a.dtype) for a in arrays})
    return table, {
        "linears_on_device": sum(a.nbytes for a in arrays),
        "linears_in_files": stored,
        "dtypes": kinds,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }


def main(plugin: str, devices: str, dtype: str, ids: str, out: str, *checkpoints: str) -> None:
    if plugin == "yes":
        from importlib.metadata import entry_points

        (own,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "awq_jax")
        own.load()()
    tokens = np.load(ids)
    for path in map(Path, checkpoints):
        try:
            table, facts = run(path, dtype, tokens)
            np.save(Path(out, f"{path.name}.npy"), table)
            Path(out, f"{path.name}.json").write_text(json.dumps(facts))
        except Exception as error:
            traceback.print_exc()
            Path(out, f"{path.name}.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
