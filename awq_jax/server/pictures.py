"""Images in messages: data URLs, decoded by Pillow and made ready by the checkpoint's processor in transformers.

Nothing is fetched: an address is refused.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from awq_jax.convert.source import path_of
from awq_jax.errors import ConfigError, MissingPackageError, install
from awq_jax.models.vision.config import QwenVision
from awq_jax.serve.engine.engine import Engine
from awq_jax.server.fields import Fields
from awq_jax.server.problems import Problem

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MOST_IMAGES = 32
MOST_PIXELS = 1 << 25  # of one image


def data_of(part: Fields) -> bytes:
    """The file in an ``image_url`` part of a message.

    Raises:
      Problem: it is none, or an address.
    """
    given = part.object("image_url")
    url = None if given is None else given.text("url", None)
    if given is None or url is None:
        raise part.wrong("image_url", 'an object with "url"')
    where = f"{given.where}url"
    head, comma, body = url.partition(",")
    kind, *how = head.removeprefix("data:").split(";")
    if not url.startswith("data:") or not comma or not kind.startswith("image/") or how[-1:] != ["base64"]:
        told = "must be data:image/...;base64,...: this server fetches nothing, so send the image itself"
        text = f"{where} {told}; got {url[:60]!r}"
        raise Problem(text, param=where)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise Problem(f"{where} is not base64", param=where) from None


def decoded(files: Sequence[bytes]) -> list[Any]:
    """Images of Pillow's, upright and in RGB.

    Raises:
      Problem: one cannot be read, or has too many pixels.
      MissingPackageError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise MissingPackageError(f"images need the package pillow on the server: {install('serve')}") from None
    found = []
    for number, data in enumerate(files):
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                size = image.size  # read from the first bytes
                if size[0] * size[1] <= MOST_PIXELS:
                    found.append(ImageOps.exif_transpose(image).convert("RGB"))
                    continue
        except Exception as e:  # whatever the decoders make of bytes that anybody may send
            text = f"image {number} cannot be read as {', '.join(FORMATS)}: {type(e).__name__}"
            raise Problem(text, param="messages") from None
        text = f"image {number} has {size[0]} x {size[1]} pixels; at most {MOST_PIXELS:,} are taken: make it smaller"
        raise Problem(text, param="messages")
    return found


class Processor:
    """Images as a model's tower takes them, and text with the tokens that stand for them. Loaded when first used.

    Args:
      engine: whose model looks at images.
    """

    def __init__(self, engine: Engine):
        self.vision, self.most = engine.programs.config.vision, engine.programs.most_features
        self._path = path_of(engine.model.source)
        self._lock = threading.Lock()

    def prompt(self, ids: Sequence[int], text: str, images: Sequence[Any]) -> dict[str, Any]:
        """What `Engine.submit` takes.

        Args:
          ids, text: of the conversation, with one mark for each image, as ids and as a text.
          images: of Pillow's.

        Raises:
          Problem: the template left images out, or they are none that the processor takes.
          ConfigError: the checkpoint's processor cannot be used.
        """
        with self._lock:
            processor = self._loaded
        marks = list(ids).count(self.vision.token) if isinstance(self.vision, QwenVision) else len(images)
        if marks != len(images):
            raise Problem(f"the conversation has {len(images)} images and {marks} marks for them", param="messages")
        try:
            if isinstance(self.vision, QwenVision):
                found = processor(images=list(images), size=self._size(processor, self.vision), return_tensors="np")
            else:
                bos = getattr(processor.tokenizer, "bos_token", None)
                special = not (bos and text.startswith(bos))  # as the processor does with a chat template
                given = {"text": [text], "images": [list(images)], "add_special_tokens": special}
                return dict(processor(**given, return_tensors="np"))
        except Exception as e:
            said = f"the model's processor does not take these images: {type(e).__name__}: {str(e)[:300]}"
            raise Problem(said, param="messages") from None
        # Their processor in transformers, which would need torchvision for videos, does this in the text.
        counts = iter(np.prod(found["image_grid_thw"], axis=1) // self.vision.merge**2)
        more = [[i] * int(next(counts)) if i == self.vision.token else [i] for i in ids]
        return {"input_ids": [[i for part in more for i in part]], **found}

    def _size(self, processor: Any, vision: QwenVision) -> dict[str, int]:
        """Pixels that an image is scaled to, at least and at most."""
        most = self.most * (vision.patch * vision.merge) ** 2
        return {k: min(int(processor.size[k]), most) for k in ("shortest_edge", "longest_edge")}

    @functools.cached_property
    def _loaded(self) -> Any:
        import transformers

        kind = transformers.AutoImageProcessor if isinstance(self.vision, QwenVision) else transformers.AutoProcessor
        try:
            return kind.from_pretrained(str(self._path), local_files_only=True, trust_remote_code=False)
        except Exception as e:  # files of anybody's, read by another package
            raise ConfigError(
                f"the processor of {self._path} cannot be used ({type(e).__name__}: {str(e)[:300]}): is "
                "preprocessor_config.json beside the weights?"
            ) from None
