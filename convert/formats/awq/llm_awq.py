"""llm-awq's second layout: GEMV_FAST with the zeros named ``scaled_zeros``; runs in TinyChat.

llm-awq itself writes a state dict as a ``.pt`` file and takes the group size on its command line. What
is read here is safetensors of the same tensors: such as TinyChat loads, GPTQModel and transformers
write, or ``safetensors.torch.save_file(torch.load(...))`` makes. Scales may be bfloat16.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from awq_jax.convert.arrays.fitting import cast_scales
from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.files.safetensors import SafetensorsDir
from awq_jax.convert.format import Example, Format, Record, quant_method
from awq_jax.convert.formats.awq.common import zeros_width
from awq_jax.convert.formats.awq.gemv_fast import FastEncoder, FastSource
from awq_jax.errors import FormatError
from awq_jax.qtensor import QuantizedTensor

MARK = ".scaled_zeros"
GROUPS = (128, 64, 32)  # llm-awq's, its default first


def group_size(directory: Path) -> int:
    """The group size that the widths of the scales allow, where no config gives it.

    Raises:
      FormatError: if they allow none or several.
    """
    files = SafetensorsDir(directory)
    sizes = set()
    for name in files.names():
        if name.endswith(MARK):
            qweight, zeros = files.entry(f"{name.removesuffix(MARK)}.qweight").shape, files.entry(name).shape
            sizes.add((qweight[-1] if qweight else 0, zeros[0] if zeros else 0))
    fits = [g for g in GROUPS if all(k % g == 0 and 8 * (zeros_width(k, g) or 0) == rows for k, rows in sizes)]
    if len(fits) != 1:
        raise FormatError(
            f"{directory}: the group size cannot be told from the shapes; add it to config.json: "
            '{"quantization_config": {"quant_method": "awq", "backend": "llm-awq", "group_size": 128}}'
        )
    return fits[0]


def is_llm_awq(config: HfConfig, names: Collection[str]) -> bool:
    """Told by the tensor names: configs seldom say."""
    return quant_method(config) in ("awq", "") and any(n.endswith(MARK) for n in names)


class LlmAwqSource(FastSource):
    """Reader; see the module.

    Raises:
      FormatError: for other settings than 4 bits, or if the group size is unknown.
      CheckpointError: if a linear's tensors are incomplete or do not fit each other.
    """

    format = "llm-awq"
    required = ("qweight", "scales", "scaled_zeros")

    def __init__(self, directory: Path, config: JsonObject) -> None:
        quant = config.get("quantization_config")
        if not isinstance(quant, dict):
            quant = {"quant_method": "awq", "group_size": group_size(directory)}
        super().__init__(directory, {**config, "quantization_config": quant})


class LlmAwqEncoder(FastEncoder):
    """Writer; see `awq_jax.convert.format.Encoder`."""

    version = "llm-awq"
    zeros_name = "scaled_zeros"

    def values(self, name: str, q: QuantizedTensor) -> QuantizedTensor:
        """Scales and offsets in float16, or as they are if both are bfloat16."""
        kept = q.offsets is not None and self.scale_dtype(q) == ml_dtypes.bfloat16
        return cast_scales(q, ml_dtypes.bfloat16) if kept else super().values(name, q)

    def scale_dtype(self, q: QuantizedTensor) -> np.dtype:
        """float16, or bfloat16 if scales and zeros are."""
        both = {np.asarray(a).dtype.name for a in (q.scales, q.offsets)}
        return np.dtype(ml_dtypes.bfloat16 if both == {"bfloat16"} else np.float16)

    def config(self, records: Sequence[Record]) -> JsonObject:
        """``quantization_config`` as transformers (4 and 5) and GPTQModel know llm-awq's checkpoints.

        Raises:
          FormatError: see `AwqEncoder.config`.
        """
        quant = super().config(records)["quantization_config"]
        return {"quantization_config": {**quant, "version": "gemm", "backend": "llm-awq"}}


FORMAT = Format(
    name="llm-awq",
    title="llm-awq (second layout): TinyChat, transformers",
    holds="as gemv_fast, also with bfloat16 scales",
    matches=is_llm_awq,
    reader=LlmAwqSource,
    encoder=LlmAwqEncoder,
    example=Example("scaled zeros"),
)
