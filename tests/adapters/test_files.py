"""PEFT's files, written here by hand: what is read, and what is refused by name."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from awq_jax import errors
from awq_jax.adapters import files

RNG = np.random.default_rng(0)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
EMBED = "base_model.model.model.embed_tokens"
DOWN = "base_model.model.model.layers.1.mlp.down_proj"


def pair(name, rank, k, n):
    a, b = RNG.normal(size=(rank, k)), RNG.normal(size=(n, rank))
    return {f"{name}.lora_A.weight": a.astype(np.float32), f"{name}.lora_B.weight": b.astype(np.float32)}


def write(path, tensors, **config):
    path.mkdir()
    save_file(tensors, path / files.TENSORS)
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | config
    (path / files.CONFIG).write_text(json.dumps(told))
    return path


def test_ranks_alphas_and_scales(tmp_path):
    tensors = pair(Q, 4, 6, 5) | pair(DOWN, 2, 3, 7)
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 32}}
    for rslora, root in ((False, 1), (True, 2)):
        found = files.read(write(tmp_path / f"{rslora}", tensors, use_rslora=rslora, **patterns))
        q, down = (found.factors[n.removeprefix(files.PREFIX)] for n in (Q, DOWN))
        assert q.scale == 32 / (2 if rslora else 4)
        assert down.scale == pytest.approx(8 / 2 ** (1 / root))
        np.testing.assert_array_equal(q.a, tensors[f"{Q}.lora_A.weight"])
        np.testing.assert_array_equal(down.b, tensors[f"{DOWN}.lora_B.weight"])


def test_written_and_read_again(tmp_path):
    def factors(rank, scale):
        a, b = RNG.normal(size=(rank, 6)), RNG.normal(size=(5, rank))
        return files.Factors(a.astype(np.float32), b.astype(np.float32), scale)

    own = {"model.layers.0.self_attn.q_proj": factors(4, 2.0), "model.layers.1.self_attn.q_proj": factors(2, 0.5)}
    config = files.config_of(own, [*own, "model.layers.0.mlp.up_proj"], "owner/base")
    assert config["target_modules"] == ["q_proj"]
    assert config["init_lora_weights"] is True
    files.write(files.Adapter(own, config), tmp_path / "a")
    again = files.read(tmp_path / "a")
    for module, f in own.items():
        assert again.factors[module].scale == f.scale
        np.testing.assert_array_equal(again.factors[module].a, f.a)
        np.testing.assert_array_equal(again.factors[module].b, f.b)
    # One of several linears of a name: then names alone would mean the others, too.
    some = files.config_of(own, [*own, "model.layers.2.self_attn.q_proj"], "owner/base")
    assert some["target_modules"] == sorted(own)
    with pytest.raises(errors.CheckpointError, match="exists"):
        files.write(files.Adapter(own, config), tmp_path / "a")
    files.write(files.Adapter(own, config), tmp_path / "a", overwrite=True)


GOOD = pair(Q, 4, 6, 5)
WRONG = {
    "no prefix": ({n.removeprefix(files.PREFIX): t for n, t in GOOD.items()}, {}, "would pass over"),
    "rank": (pair(Q, 3, 6, 5), {}, "rank 4 in adapter_config"),
    "one factor": (dict(list(GOOD.items())[:1]), {}, "lora_A of model.layers.0.self_attn.q_proj, and not the other"),
    "no factors": ({f"{files.PREFIX}lm_head.weight": np.ones((2, 2), np.float32)}, {}, "would have no effect"),
    "nan": (GOOD | {f"{Q}.lora_B.weight": np.full((5, 4), np.nan, np.float32)}, {}, "not of finite floats"),
    "dora": (GOOD | {f"{Q}.lora_magnitude_vector": np.ones(5, np.float32)}, {}, "DoRA"),
    "dora said": (GOOD, {"use_dora": True}, "use_dora=True"),
    "embedding": (GOOD | {f"{EMBED}.lora_embedding_A": np.ones((4, 9), np.float32)}, {}, "embedding"),
    "bias": (GOOD, {"bias": "all"}, "bias='all'"),
    "method": (GOOD, {"peft_type": "IA3"}, "only LORA is read"),
    "alpha": (GOOD, {"lora_alpha": None}, "lora_alpha=None"),
    "parameters": (GOOD, {"target_parameters": ["experts.down_proj"]}, "bare parameters"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_refusals(tmp_path, case):
    tensors, config, says = WRONG[case]
    with pytest.raises(errors.AwqError, match=says):
        files.read(write(tmp_path / "a", tensors, **config))


def test_no_adapter_and_pickles(tmp_path):
    with pytest.raises(errors.CheckpointError, match="has no adapter_config"):
        files.read(tmp_path)
    where = write(tmp_path / "a", GOOD)
    (where / files.TENSORS).rename(where / "adapter_model.bin")
    with pytest.raises(errors.CheckpointError, match="pickles are not read"):
        files.read(where)
