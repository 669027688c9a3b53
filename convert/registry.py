"""Which formats there are, and opening a checkpoint in any of them."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from awq_jax.convert import head, unmatched
from awq_jax.convert.config_json import QUANTIZATION, JsonObject, with_quantization_on_top
from awq_jax.convert.files.safetensors import find_files, read_header, read_json
from awq_jax.convert.format import Format
from awq_jax.convert.formats import auto_round, compressed_tensors, float_weights, gptq, mlx, native, orbax, orbax_files
from awq_jax.convert.formats.awq import gemm, gemv, gemv_fast, llm_awq, marlin
from awq_jax.convert.formats.gguf import encoder
from awq_jax.convert.formats.gguf.source import GgufSource
from awq_jax.convert.source import Source, read_config
from awq_jax.errors import CheckpointError, ConfigError, FormatError, Setting

_FORMATS = (
    llm_awq.FORMAT,  # before those whose config it may share
    gemv.FORMAT,
    gemv_fast.FORMAT,
    marlin.FORMAT,
    gemm.FORMAT,
    compressed_tensors.FORMAT,
    gptq.FORMAT,
    gptq.FORMAT_V2,
    native.FORMAT,
    mlx.FORMAT,
    orbax.FORMAT,
    *encoder.FORMATS,
    float_weights.FORMAT,
)
FORMATS: Mapping[str, Format] = {f.name: f for f in _FORMATS}

REMEDIES = {
    "mxfp4": ". Make it float with transformers: AutoModelForCausalLM.from_pretrained(SRC, "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(DST)",
    "fp8": ". Make it float with transformers: AutoModelForCausalLM.from_pretrained(SRC, "
    "quantization_config=FineGrainedFP8Config(dequantize=True)).save_pretrained(DST)",
}


def get(name: str) -> Format:
    """The format of that name.

    Raises:
      FormatError: if there is none.
    """
    if name not in FORMATS:
        raise FormatError(f"format must be one of {', '.join(FORMATS)}; got {name!r}")
    return FORMATS[name]


def at_revision(path: str | Path, revision: str) -> str:
    """The hub id ``path`` at a branch, tag or commit: ``owner/name@revision``.

    Raises:
      ConfigError: it is no hub id, or one that names a revision itself, or the revision is no name of one.
    """
    text = os.fspath(path)
    given = Setting("revision", revision)
    if os.path.lexists(Path(text).expanduser()) or text.endswith(".gguf") or not float_weights.HUB_ID.fullmatch(text):
        raise ConfigError(f"{given} is of a repository on the hub, and {text} is a local path; leave it out", given)
    if "@" in text:
        raise ConfigError(f"{text} names a revision, and so does {given}; leave one of them out", given)
    if not float_weights.HUB_ID.fullmatch(f"{text}@{revision}"):
        raise ConfigError(f"{revision!r} is not the name of a revision: give a branch, a tag or a commit")
    return f"{text}@{revision}"


def open_source(path: str | Path, packed: bool = False, revision: str | None = None) -> Source:
    """Open a checkpoint directory, a ``.gguf`` file, or a hub id (``owner/name``, ``owner/name@revision``).

    Args:
      path: what to open.
      packed: read GGUF's 4- and 8-bit blocks as packed weights, instead of dequantized.
      revision: branch, tag or commit of a hub id, instead of ``@revision``.

    Returns:
      The source; its config says whether the head that is stored is the embedding (see `awq_jax.convert.head`).

    Raises:
      FormatError: the quantization method is unknown, or the weights are pickles.
      CheckpointError: nothing is there, or it is damaged.
      ConfigError: see `at_revision`.
    """
    if revision is not None:
        path = at_revision(path, revision)
    text = os.fspath(path)
    local = Path(text).expanduser()
    if (
        not os.path.lexists(local)
        and isinstance(path, str)
        and float_weights.HUB_ID.fullmatch(text)
        and local.suffix != ".gguf"
    ):
        local = float_weights.download(text)
    if local.is_file():
        if local.suffix.lower() != ".gguf":
            raise CheckpointError(f"{local} is not a .gguf file; for safetensors pass the directory they are in")
        return GgufSource(local, packed)
    if not local.is_dir():
        raise CheckpointError(f"{local} does not exist; pass a checkpoint directory, a .gguf file or a hub id")
    source = _open_directory(local)
    head.settle(source)
    unmatched.warn(source)
    return source


def _open_directory(directory: Path) -> Source:
    ggufs = sorted(directory.glob("*.gguf"))
    if ggufs and not any(directory.glob("*.safetensors")):
        raise CheckpointError(f"{directory} holds GGUF files; pass one of them, e.g. {ggufs[0]}")
    float_weights.refuse_pickles(directory)
    config = with_quantization_on_top(read_config(directory))
    config = auto_round.translated(_with_legacy(directory, config))
    names = _names(directory)
    for format in FORMATS.values():
        if format.reader is not None and format.matches(config, names):
            return format.reader(directory, config)
    quant = config.get("quantization_config", config.get("quantization"))
    method = quant.get("quant_method") if isinstance(quant, dict) else quant
    readable = ", ".join(f.name for f in FORMATS.values() if f.reader is not None)
    raise FormatError(
        f"{directory} has quant_method {str(method)[:100]!r}, which is not readable; known are {readable} and .gguf "
        f"files{REMEDIES.get(str(method), '')}"
    )


def _with_legacy(directory: Path, config: JsonObject) -> JsonObject:
    """``config`` with the settings that AutoAWQ and AutoGPTQ once kept in files of their own."""
    if set(QUANTIZATION) & set(config):
        return config
    gptq_settings = directory / "quantize_config.json"
    if gptq_settings.is_file():
        return {**config, "quantization_config": {"quant_method": "gptq", **read_json(gptq_settings)}}
    legacy = directory / "quant_config.json"
    if not legacy.is_file():
        return config
    old = read_json(legacy)
    quant = {
        "quant_method": "awq",
        "bits": old.get("w_bit"),
        "group_size": old.get("q_group_size"),
        "zero_point": old.get("zero_point"),
        "version": old.get("version", "gemm"),
    }
    return {**config, "quantization_config": quant}


def _names(directory: Path) -> Collection[str]:
    """Tensor names of a directory, from the headers alone; none of an Orbax checkpoint."""
    if orbax_files.holds_params(directory):
        return ()
    return {name for file in find_files(directory)[1] for name in read_header(file)[0]}
