"""Float Hugging Face checkpoints: a directory of safetensors, or a hub id downloaded to one."""

import re
from pathlib import Path

from awq_jax.convert.config_json import JsonObject
from awq_jax.convert.files.companions import COMPANIONS, UNSAFE
from awq_jax.convert.format import BaseEncoder, Format, Stored
from awq_jax.convert.source import MARKS, DirectorySource
from awq_jax.errors import CheckpointError, FormatError, needed
from awq_jax.qtensor import QuantizedTensor

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\S+))?")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONFIGS = ("config.json", "quant_config.json")


class FloatSource(DirectorySource):
    """A directory with ``config.json`` and float safetensors.

    Raises:
      FormatError: if the tensors are packed, though the config does not say how.
      CheckpointError: on damaged or unsafe files.
    """

    def __init__(self, directory: Path, config: JsonObject) -> None:
        super().__init__(directory, config)
        packed = next((n for n in self.names() if n.rpartition(".")[2] in MARKS), None)
        if packed:
            raise FormatError(
                f"{directory} holds packed weights ({packed}) but its config.json has no quantization_config to say "
                "how; take config.json from where the checkpoint was published"
            )


class FloatEncoder(BaseEncoder):
    """Every packed weight is stored dequantized."""

    def fit(self, name: str, q: QuantizedTensor) -> QuantizedTensor | None:
        """None: all tensors are float."""
        return None

    def encode(self, name: str, q: QuantizedTensor) -> Stored:
        raise AssertionError("never called: fit returns None")


def refuse_pickles(directory: Path) -> None:
    """Raise if the only weights are pickles, which can run code when they are read.

    Raises:
      FormatError: naming a file and how to convert it.
    """
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern) if p.name != "training_args.bin")
    if pickles:
        raise FormatError(
            f"{directory} holds its weights only as {pickles[0]}, a pickle, which can run code when read. If you trust "
            "it, convert it: transformers.AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST) writes "
            "safetensors"
        )


def download(hub_id: str) -> Path:
    """Snapshot of a hub repository: ``owner/name`` or ``owner/name@revision``.

    Only safetensors, JSON, tokenizer files and card of the top folder are fetched, and chat templates; never code or
    pickles.

    Returns:
      The snapshot directory in the Hugging Face cache.

    Raises:
      CheckpointError: if it cannot be fetched (offline, unknown, gated) and is not in the cache.
      FormatError: if the repository has no safetensors.
    """
    huggingface_hub = needed("huggingface_hub", f"{hub_id}, a hub id,")  # only where it is needed: it takes a while

    match = HUB_ID.fullmatch(hub_id)
    if not match:
        raise CheckpointError(f"{hub_id!r} is not a hub id like owner/name")
    try:
        path = huggingface_hub.snapshot_download(
            match["repo"],
            revision=match["revision"],
            allow_patterns=["*.safetensors", "*.safetensors.index.json", *CONFIGS, *COMPANIONS, "README.md"],
            # "*" passes "/", and no pattern can except a folder: of folders, only .jinja files are let through.
            ignore_patterns=["*/*.[!j]*", "*/*.j[!i]*", "consolidated*", *UNSAFE],
        )
    except Exception as e:  # huggingface_hub's errors share no base class with those of its HTTP library
        raise CheckpointError(
            f"{hub_id!r} is neither a local path nor could it be fetched from the hub: {type(e).__name__}: "
            f"{str(e).strip().splitlines()[0] if str(e).strip() else ''} Check the spelling, the connection and "
            "`hf auth login`, or pass a directory downloaded elsewhere"
        ) from e
    directory = Path(path)
    if not any(directory.glob("*.safetensors")):
        raise FormatError(f"{hub_id!r} publishes no safetensors in its top folder; find a repository that does")
    return directory


FORMAT = Format(
    name="float",
    title="Hugging Face float checkpoint: transformers, vLLM and everything else",
    holds="any weight, dequantized",
    matches=lambda config, names: "quantization_config" not in config and "quantization" not in config,
    reader=FloatSource,
    encoder=FloatEncoder,
    example=None,
)
