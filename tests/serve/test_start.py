"""From files to the first token: what is traced, compiled, copied and imported on the way."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import random_decoders
import tiny_checkpoints
from flax import nnx

import awq_jax
from awq_jax import dtypes, models
from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.files import slices
from awq_jax.kernels import native
from awq_jax.models.decoder import Decoder
from awq_jax.models.weights import params
from awq_jax.serve import alike_layers
from awq_jax.serve.generate import Generator
from awq_jax.serve.sampling import Draws

# In a process of its own: what is imported and compiled by loading a model and generating its first token.
FIRST_TOKEN = """
import collections, json, sys
import awq_jax
assert "jax" not in sys.modules
load = awq_jax.load
import jax
programs = collections.Counter()
def seen(name, seconds, **about):
    if name.endswith("backend_compile_duration"):
        programs[about.get("fun_name")] += 1
jax.monitoring.register_event_duration_secs_listener(seen)
model = load(sys.argv[1])
loading = sum(programs.values())
model.generate("ab", max_new_tokens=1)
unneeded = ("transformers", "torch", "datasets", "awq_jax.quantizer", "awq_jax.stream", "awq_jax.data")
print(json.dumps([loading, sum(programs.values()), sorted(set(unneeded) & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("start")
    tiny_checkpoints.checkpoint(directory / "float")
    model = awq_jax.load(directory / "float")
    model.quantize(bits=4, group_size=16, method="rtn", progress=False)
    model.save(directory / "packed", format="awq-jax")
    return directory / "packed"


def test_the_first_token_takes_few_programs_and_no_transformers(packed: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_TOKEN, str(packed)], capture_output=True, text=True, check=True)
    loading, all_of_it, imported = json.loads(done.stdout)
    assert imported == []
    assert loading <= 1  # the head is transposed
    assert all_of_it <= 7  # the prompt's, and those of the random key


def test_a_copy_is_made_once_it_pays(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "target", lambda name="": "its code cannot be compiled here: for a test")
    model = awq_jax.load(packed)
    [few] = model.generate([[1, 2, 3]], max_new_tokens=2)
    assert "is made for more than 16 tokens" in model.explain()
    [many] = model.generate([[1, 2, 3]], max_new_tokens=20)
    assert model.explain().startswith("served as a float32 copy")
    assert many.startswith(few)
    [again] = model.generate([[1, 2, 3]], max_new_tokens=2)
    assert again == few
    assert model.explain().startswith("served as a float32 copy")


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # layers of one kind, and of two
def test_layers_are_built_once_for_each_kind(family: str) -> None:
    config = models.config_from_hf({"model_type": family} | tiny_checkpoints.SIZES | {"num_hidden_layers": 5})
    graphdef, state = params.abstract(config)
    whole, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    assert graphdef == whole
    assert jax.tree.structure(state) == jax.tree.structure(shapes)
    assert [a.shape for a in jax.tree.leaves(state)] == [a.shape for a in jax.tree.leaves(shapes)]


def test_layers_that_are_traced_once_compute_the_same_bits() -> None:
    config, graphdef, state = random_decoders.decoder()
    tokens = jnp.arange(12).reshape(2, 6) % config.vocab_size
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))

    def hidden(state: nnx.State, **how: object) -> jax.Array:
        return nnx.merge(graphdef, state).hidden(tokens, positions, None, **how)

    plain, once = jax.jit(hidden)(state), jax.jit(lambda s: hidden(s, call=alike_layers.call))(state)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(once), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_read_is_used_where_it_lies(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(3) + np.arange(1000, dtype=np.float32).tobytes())
    read = slices.read_bytes(file, 3, 4000, "w").view(np.float32)
    held = params._held(read)
    np.testing.assert_array_equal(held, np.arange(1000))
    assert held.unsafe_buffer_pointer() == read.ctypes.data


@pytest.mark.parametrize("bits", [3, 4])
def test_an_embedding_is_dequantized_in_pieces(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(bits)
    k, n = 64, 37
    words = codes.pack(rng.integers(0, 2**bits, (k, n), np.uint8), bits)
    scales, offsets = rng.normal(size=(2, k // 16, n)).astype(np.float16)
    q = linear.build(words, scales, None, bits, 16, k, n, "float32", offsets=offsets)
    monkeypatch.setattr(codes, "PIECE", 5 * k)
    out = codes.dequantize_transposed(q)
    np.testing.assert_array_equal(out, codes.dequantize(q).T)
    assert out.flags.c_contiguous


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite(dtype: str, bad: float) -> None:
    array = np.full((3, 200_000), -1.5).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    array[0, 0] = ml_dtypes.finfo(array.dtype).max
    assert dtypes.all_finite(array)
    array[2, -1] = bad
    assert not dtypes.all_finite(array)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # layers of one kind, and of two
def test_a_prompt_read_layer_by_layer_is_that_of_the_whole_program(family: str) -> None:
    config = models.config_from_hf({"model_type": family} | tiny_checkpoints.SIZES | {"num_hidden_layers": 4})
    decoder = Decoder(config, rngs=nnx.Rngs(1))
    graphdef, state = nnx.split(decoder)
    generator = Generator(graphdef, config)
    assert generator.reads_by_layer
    tokens, lengths = np.arange(12).reshape(2, 6) % config.vocab_size, np.array([6, 4], np.int32)
    np.testing.assert_allclose(generator.forward(state, tokens), generator._whole(state, tokens), rtol=0, atol=1e-5)
    run, _ = generator.by_layer.prompt(state, tokens, lengths, Draws(), slots=9)
    found, want = run(), generator.prefill(state, tokens, lengths, Draws(), slots=9)
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_reading_layer_by_layer_compiles_one_program_for_each_kind_of_layer() -> None:
    config = models.config_from_hf({"model_type": "gemma2"} | tiny_checkpoints.SIZES | {"num_hidden_layers": 6})
    graphdef, state = nnx.split(Decoder(config, rngs=nnx.Rngs(1)))
    before = alike_layers._layer._cache_size()
    Generator(graphdef, config).forward(state, np.zeros((1, 5), np.int32))
    assert alike_layers._layer._cache_size() - before == 2  # gemma2: with a window and without
