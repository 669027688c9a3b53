"""What lies beside the weights: files that make a checkpoint usable, and code, which is left behind with its traces."""

import contextlib
import fnmatch
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.files.safetensors import read_json, refuse_outside
from awq_jax.convert.files.shards import write_json
from awq_jax.errors import CheckpointError

log = logging.getLogger(__name__)

TEMPLATES = "additional_chat_templates"  # the only subfolder copied
# Files that say how text becomes tokens. Never code, never pickles.
VOCABULARIES = (
    "tokenizer*.json", "tokenizer.model*", "*.tiktoken", "tiktoken.model", "tekken.json", "spiece.model", "spm.model",
    "sentencepiece*.model", "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt",
)  # fmt: skip
# All that is copied along. As `fnmatch` understands them, and hub downloads too.
COMPANIONS = (
    *VOCABULARIES, "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template*.jinja",
    "chat_template*.json", f"{TEMPLATES}/*.jinja", "*processor_config.json", "feature_extractor_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*", "folded_scales.npz",
)  # fmt: skip
# Never copied, even if listed above.
UNSAFE = ("*.py", "*.pyc", "*.so", "*.sh", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# Neither copied nor missed: weights, settings that are written anew, and what belongs to the repository.
OTHERS = (
    "*.safetensors*", "*.gguf", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.npz", "*.msgpack", "*.h5",
    "config.json", "quant*_config.json", "recipe.yaml", "README*", ".*", "__pycache__",
)  # fmt: skip
CONFIGS = ("config.json", "tokenizer_config.json", "*processor_config.json")
REFERENCES = ("auto_map", "custom_pipelines")  # their keys that name classes in Python files


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's name, with its folder, is one of these."""
    return any(fnmatch.fnmatchcase(name, p) and p.count("/") == name.count("/") for p in patterns)


def name_of(path: Path) -> str:
    """What a companion is called in its checkpoint, with its folder."""
    return f"{TEMPLATES}/{path.name}" if path.parent.name == TEMPLATES else path.name


def found(directory: Path) -> list[Path]:
    """The files of a checkpoint directory that are copied along.

    Raises:
      CheckpointError: one is a link out of the directory.
    """
    files = sorted(p for p in (*directory.iterdir(), *directory.glob(f"{TEMPLATES}/*")) if p.is_file())
    kept = [p for p in files if matches(name_of(p), COMPANIONS) and not matches(p.name, UNSAFE)]
    for path in kept:
        refuse_outside(path, directory)
    return kept


def name_what_is_left(source: Path, target: Path) -> None:
    """Log which files of ``source`` were not copied, code first."""
    left = [p for p in sorted(source.iterdir()) if not matches(p.name, OTHERS) and p.name != TEMPLATES]
    left = [p for p in left if not (target / p.name).exists()]
    code = [p.name for p in left if p.suffix == ".py"]
    if code:
        log.warning("%s of %s not copied: code never is", _list(code), source)
    if rest := [f"{p.name}/" if p.is_dir() else p.name for p in left if p.suffix != ".py"]:
        log.info("%s of %s not copied", _list(rest), source)


def forget_code(directory: Path) -> None:
    """Take out of a checkpoint's configs what names Python files that are not there, and say so."""
    for path in sorted(p for p in directory.glob("*.json") if matches(p.name, CONFIGS)):
        with contextlib.suppress(CheckpointError):  # a companion that is damaged was so before, and is not read here
            _forget_code(path)


def _forget_code(path: Path) -> None:
    data, gone = without_code(read_json(path))
    if gone:
        if (path.parent / "tokenizer.json").is_file() and str(data.get("tokenizer_class")) in {
            g.rpartition(".")[2] for g in gone
        }:
            data["tokenizer_class"] = "PreTrainedTokenizerFast"  # it splits as tokenizer.json says
        write_json(path, data)
        log.warning("%s: removed auto_map, which names code that is never copied: %s", path.name, _list(gone))


def without_code(config: HfConfig) -> tuple[JsonObject, list[str]]:
    """``config`` without references to Python files beside it, and those; what names a file on the hub stays."""
    kept: JsonObject = {}
    gone: list[str] = []
    for key, value in config.items():
        if key in REFERENCES and (local := _local(value)):
            gone += local
            if isinstance(value, Mapping) and (rest := {k: v for k, v in value.items() if not _local(v)}):
                kept[key] = rest
        elif isinstance(value, Mapping):
            kept[key], more = without_code(value)
            gone += more
        else:
            kept[key] = value
    return kept, list(dict.fromkeys(gone))


def _classes(value: object) -> list[str]:
    """The ``module.Class`` texts in what a reference holds."""
    if isinstance(value, str):
        return [value] if "." in value else []
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [c for v in inside for c in _classes(v)]


def _local(value: object) -> list[str]:
    """Those of `_classes` that are in a file beside the config; ``owner/name--module.Class`` is on the hub."""
    return [c for c in _classes(value) if "--" not in c]


def _list(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
