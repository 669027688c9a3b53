"""What the reference decoder needs to know about the part of a model that looks at images."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A vision transformer over one square picture (arXiv 2010.11929).

    Attributes:
      size, layers, heads, mlp: width, number of layers and of heads, inner width of the MLPs.
      image, patch: sides of the picture and of a patch, in pixels.
      channels: of a pixel.
      activation: of the MLPs, a name in `awq_jax.models.layers.mlp.ACTIVATIONS`.
      eps: of the norms.
      class_token: CLIP: a learned token stands before the patches and a norm before the layers.
        SigLIP has neither, and a bias in the linear of the patches.
    """

    size: int
    layers: int
    heads: int
    mlp: int
    image: int
    patch: int
    channels: int = 3
    activation: str = "quick_gelu"
    eps: float = 1e-5
    class_token: bool = True

    @property
    def side(self) -> int:
        """Patches along an edge of the picture."""
        return self.image // self.patch


@dataclasses.dataclass(frozen=True)
class LlavaVision:
    """LLaVA: hidden states of a tower through an MLP (arXiv 2310.03744).

    Attributes:
      token: id that stands for one feature of an image in the text.
      tower: looks at the pictures.
      features: which hidden states of the tower are taken, side by side; 0 is what its layers read,
        and -1 what the last one makes.
      drop_first: the feature of the class token is not taken.
      activation, bias: of the MLP.
      tiles: LLaVA-NeXT: ``(height, width)`` in pixels of the pictures that an image may be cut from
        into tiles; empty if an image is one picture.
    """

    token: int
    tower: ViTConfig
    features: tuple[int, ...] = (-2,)
    drop_first: bool = True
    activation: str = "gelu"
    bias: bool = True
    tiles: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Gemma3Vision:
    """Gemma 3: a tower whose features are averaged over squares and projected (arXiv 2503.19786).

    The tokens of an image see each other in both directions.

    Attributes:
      token: see `LlavaVision`.
      tower: looks at the pictures.
      side: features along an edge of a picture.
    """

    token: int
    tower: ViTConfig
    side: int


@dataclasses.dataclass(frozen=True)
class QwenVision:
    """Qwen2-VL and its successors: images of any size, patch by patch (arXiv 2409.12191).

    Attributes:
      token: see `LlavaVision`.
      size, layers, heads, mlp: of the tower.
      patch, temporal, channels: a patch is ``[channels, temporal, patch, patch]``.
      merge: ``merge x merge`` patches make one feature.
      activation: of the MLPs.
      gated, rms: the MLPs have a gate; the norms are RMSNorms (Qwen2.5-VL).
      patch_bias: the linear of the patches has a bias.
      window: side of the windows of attention, in features; None for none.
      full: layers without window.
      positions: side of a learned square of position embeddings that is stretched over each image;
        None for none.
      deepstack: layers after which features are taken that are added to what the first layers of the
        decoder make (arXiv 2406.04334).
    """

    token: int
    size: int
    layers: int
    heads: int
    mlp: int
    patch: int
    temporal: int = 2
    channels: int = 3
    merge: int = 2
    activation: str = "quick_gelu"
    gated: bool = False
    rms: bool = False
    patch_bias: bool = False
    window: int | None = None
    full: tuple[int, ...] = ()
    positions: int | None = None
    deepstack: tuple[int, ...] = ()


VisionConfig = LlavaVision | Gemma3Vision | QwenVision

TOWER = "looks at images: towers and projectors stay float"  # why a plan skips a linear of `VisionConfig`'s
