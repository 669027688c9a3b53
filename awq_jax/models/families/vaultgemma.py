"""VaultGemma: Gemma 2 without the norms after each half of a layer."""

from awq_jax.convert.config_json import HfConfig
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import gemma2
from awq_jax.models.names import names

NAMES = names({"post_attention_layernorm": "pre_feedforward_layernorm"})


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "vaultgemma"."""
    return gemma2.config(hf, norms="pre", names=NAMES)
