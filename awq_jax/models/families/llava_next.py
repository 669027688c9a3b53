"""LLaVA-NeXT (1.6): LLaVA that looks at an image as a whole and at tiles of it"""

from awq_jax.convert.config_json import HfConfig
from awq_jax.errors import ConfigError
from awq_jax.models.config import ModelConfig
from awq_jax.models.families import llava

TILES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def config(hf: HfConfig) -> ModelConfig:
    """``model_type`` "llava_next".

    Raises:
      ConfigError: if ``image_grid_pinpoints`` are not pairs of sizes.
    """
    tiles = tuple(tuple(t) for t in hf.get("image_grid_pinpoints") or TILES)
    if not all(len(t) == 2 and all(type(n) is int and n > 0 for n in t) for t in tiles):
        raise ConfigError(f"config.json: image_grid_pinpoints must be [height, width] pairs; got {str(tiles)[:100]}")
    return llava.config(hf, tiles=tiles)
