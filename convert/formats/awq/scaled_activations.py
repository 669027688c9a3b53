"""Scaled activations: AWQ's way to scale a linear that an activation function feeds.

Nothing before a GELU can absorb a scale, so AutoAWQ and llm-awq divide its output: the module
``ScaledActivation`` with a tensor ``mlp.act.scales`` ``[K]``, in the models below in every layer (ones
where nothing was scaled). Here it is a part of the linear that it feeds, as ``inv_scale = 1 / scales``.

vLLM stops at these tensors (``KeyError``, release 0.32), so ones are not written where it may be the reader;
transformers 5 with GPTQModel has the module in any case, and without the tensor computes with what the memory held.
"""

import dataclasses
import re

import numpy as np

from awq_jax.convert.config_json import HfConfig
from awq_jax.convert.files.safetensors import TensorFiles
from awq_jax.convert.source import PackedSource
from awq_jax.dtypes import FLOATS
from awq_jax.errors import CheckpointError, FormatError, WeightError
from awq_jax.qtensor import QuantizedTensor

STORED = re.compile(r"(?P<parent>.+)\.(act|gelu_impl)\.scales")
FED = ("dense_4h_to_h", "down_proj", "fc_out", "c_proj")
# model_type: the activation and the linear that it feeds (transformers: AWQ_SCALES_MAPPINGS)
MODELS = {
    "starcoder2": ("act", "c_proj"),
    "gpt_bigcode": ("act", "c_proj"),
    "falcon": ("act", "dense_4h_to_h"),
    "RefinedWebModel": ("act", "dense_4h_to_h"),
    "gpt_neox": ("act", "dense_4h_to_h"),
    "bloom": ("gelu_impl", "dense_4h_to_h"),
    "mpt": ("act", "down_proj"),
    "gptj": ("act", "fc_out"),
}
PARENTS = {"mpt": "ffn"}


def scales_by_weight(source: PackedSource) -> dict[str, str]:
    """Packed weights that a scaled activation feeds, and the names of its scales.

    Raises:
      CheckpointError: a scale does not fit the linear that it feeds.
      FormatError: that linear is not packed.
    """
    out = {}
    for name in source.names():
        match = STORED.fullmatch(name)
        if match is None:
            continue
        fed = [w for w in (f"{match['parent']}.{m}.weight" for m in FED) if w in source.packed]
        if len(fed) != 1:
            raise FormatError(
                f"{source.directory}: {name} scales an activation, but the linear after it is not packed; quantize it "
                "too, or take the float checkpoint"
            )
        entry, k = source.files.entry(name), source.shape(fed[0])[1]
        if entry.shape != (k,) or entry.dtype.name not in FLOATS:
            raise CheckpointError(f"{source.directory}: {name} is {entry.dtype} {entry.shape}; {fed[0]} has {k} inputs")
        out[fed[0]] = name
    return out


def with_inv_scale(q: QuantizedTensor, name: str, files: TensorFiles) -> QuantizedTensor:
    """The weight that takes the activation as it is; ``q`` if the scales are ones.

    Raises:
      WeightError: a scale is zero, NaN or inf.
    """
    scales = files.read(name).astype(np.float32)
    if not np.isfinite(scales).all() or not scales.all():
        raise WeightError(f"{name} of {files.directory} holds NaN, inf or zero; download it again")
    return q if (scales == 1).all() else dataclasses.replace(q, inv_scale=1 / scales)


def are_in(config: HfConfig) -> bool:
    """Whether AutoAWQ scales activations of the family."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in MODELS


def scales_name(name: str, config: HfConfig) -> str | None:
    """Name of the scales of the activation that feeds a weight, in models that have one."""
    model_type = config.get("model_type")
    act, fed = MODELS.get(model_type, ("", "")) if isinstance(model_type, str) else ("", "")
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    inside = parent.rpartition(".")[2] == PARENTS.get(str(model_type), "mlp")
    return f"{parent}.{act}.scales" if act and last == fed and inside else None


def rounded(q: QuantizedTensor, activation: str | None) -> QuantizedTensor:
    """With ``1 / inv_scale`` rounded to float16; ``q`` itself if it is that already, or cannot be stored."""
    if q.inv_scale is None or activation is None:
        return q
    inverse = 1 / _scales(q).astype(np.float32)
    same = np.asarray(q.inv_scale).astype(np.float32) == inverse
    return q if same.all() else dataclasses.replace(q, inv_scale=inverse)


def check(name: str, q: QuantizedTensor, activation: str | None, format: str) -> None:
    """Refuse an ``inv_scale`` that nothing holds.

    Raises:
      FormatError: naming the weight and the remedy.
    """
    if q.inv_scale is None:
        return
    if activation is None:
        raise FormatError(
            f"{name} has an explicit inv_scale, which {format} holds only after the activations of "
            f"{', '.join(sorted(MODELS))}; quantize with explicit_scale=False, or save as 'awq-jax'"
        )
    scales = _scales(q)
    if not np.isfinite(scales).all() or not scales.all():
        raise FormatError(f"{name} has an inv_scale that float16 cannot hold; save as 'awq-jax'")


def without_inv_scale(q: QuantizedTensor) -> QuantizedTensor:
    """``q`` less its ``inv_scale``."""
    return q if q.inv_scale is None else dataclasses.replace(q, inv_scale=None)


def stored(q: QuantizedTensor, activation: str | None, ones: bool = True) -> dict[str, np.ndarray]:
    """The scales to store with a weight; if it has none ``ones``, or nothing."""
    if activation is None or (q.inv_scale is None and not ones):
        return {}
    return {activation: np.ones(q.k, np.float16) if q.inv_scale is None else _scales(q)}


def _scales(q: QuantizedTensor) -> np.ndarray:
    with np.errstate(over="ignore", divide="ignore"):
        return (1 / np.asarray(q.inv_scale).astype(np.float64)).astype(np.float16)
