"""Patterns of settings that have no effect are refused, and the message says what they might have meant."""

import numpy as np
import pytest

import awq_jax
from awq_jax import models
from awq_jax.config import AwqConfig
from awq_jax.errors import ConfigError
from awq_jax.quantizer.targets import select
from awq_jax.stream.session import Session

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA = {"model_type": "llama", "vocab_size": 96, "max_position_embeddings": 64, "rms_norm_eps": 1e-5} | SIZES
DOWN = "layers/0/mlp/down_proj/kernel"


def targets(tied=False, **settings):
    config = models.config_from_hf(LLAMA | {"tie_word_embeddings": tied})
    return set(Session(config, AwqConfig(group_size=32, **settings)).targets)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        (r"model\.layers\.0\.", "'layers/0/' matches 7"),
        ("re:.*down_proj", "'.*down_proj' matches 2"),
        (r"down_proj$", "'down_proj' matches 2"),
        ("model.layers.[01].mlp.up_proj.weight", r"'layers/[01]/mlp/up_proj' matches 2"),
        (r"-:^model\.layers\.1\.mlp\..*$", "'layers/1/mlp/.*' matches 3"),
        ("mlp/donw_proj", f"; the closest are {DOWN}"),
        ("layers/2/", "; the closest are layers/0/"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_one_that_does(pattern, meant):
    for settings in ({"skip": ("o_proj", pattern)}, {"overrides": ((pattern, {"bits": 8}),)}):
        with pytest.raises(ConfigError, match="matches no weight") as caught:
            targets(**settings)
        assert repr(pattern) in str(caught.value)
        assert meant in str(caught.value)


def test_what_stays_float_anyway_may_be_skipped():
    every = targets()
    for pattern in ("lm_head", "norm", "embed_tokens"):
        assert targets(skip=pattern) == every
    assert targets(tied=True, skip="lm_head") == every
    with pytest.raises(ConfigError, match="skip 'lm_head' matches no weight"):  # it would be packed as the embedding
        targets(tied=True, skip="lm_head", quantize_head=True)
    assert targets(skip="layers/0/") == {p for p in every if p.startswith("layers/1/")}


def test_overrides_of_what_is_not_quantized_or_matched_before_are_refused():
    bits = {"bits": 8}
    for settings, told in (
        ({"overrides": (("lm_head", bits),)}, "some left float .*quantize_head=True"),
        ({"overrides": (("down_proj", bits),), "skip": "mlp"}, "some left float .*matched a skip pattern"),
        ({"overrides": (("mlp", bits), ("down_proj", {"bits": 3}))}, "each of its 2 weights .*an earlier one"),
    ):
        with pytest.raises(ConfigError, match=told):
            targets(**settings)
    assert targets(overrides=(("down_proj", bits), ("mlp", {"bits": 3}))) == targets()
    assert "lm_head/kernel" in targets(overrides=(("lm_head", bits),), quantize_head=True)


def test_patterns_for_any_model_are_checked():
    params = {"up": np.ones((32, 64), np.float32), "down": np.ones((64, 16), np.float32), "bias": np.ones(16)}

    def apply(p, x):
        return (x @ p["up"]) @ p["down"] + p["bias"]

    calib = awq_jax.calibrate(apply, params, [np.ones((4, 32), np.float32)], include_head=True, progress=False)
    for skip, told in (("upp", "closest are up"), ("bias", None)):
        settings = AwqConfig(group_size=16, skip=skip, quantize_head=True)
        if told is None:
            assert set(select(calib.plan, settings, params)[0]) == {"up", "down"}
            continue
        with pytest.raises(ConfigError, match=told):
            awq_jax.quantize(params, calib, settings, progress=False)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"overrides": [("down", None)]}, "overrides are pairs of a pattern and settings; got .*'down', None"),
        ({"overrides": ["down"]}, "overrides are pairs"),
        ({"overrides": {"down": {}}}, "override 'down' sets nothing; it may set bits"),
        ({"overrides": {"down": {"bit": 3}}}, r"override 'down' sets \['bit'\]"),
        ({"skip": [None]}, "bad regular expression None"),
    ],
)
def test_settings_of_another_form_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        AwqConfig(**settings)
    assert AwqConfig(skip=None, overrides=None) == AwqConfig()
