"""Entries of a checkpoint's own lists of float or special modules that name none of its modules.

vLLM, transformers and compressed-tensors pass over them, and what is packed is read off the tensors: they are said.
"""

import logging
import re
from collections.abc import Collection

from awq_jax.convert.formats import patterns
from awq_jax.convert.source import Source
from awq_jax.errors import FormatError

# A head that is the embedding is not stored, PhiMoE's router has another name in files; classes are no names.
USUAL = re.compile(r"lm_head|mlp\.router$|^[A-Z]\w*$")
MOST = 2_000_000  # comparisons
log = logging.getLogger(__name__)


def warn(source: Source) -> None:
    """Log the entries of ``ignore``, ``modules_to_not_convert`` and ``dynamic`` that name nothing."""
    quant = source.config.get("quantization_config", source.config.get("compression_config"))
    if not isinstance(quant, dict):
        return
    lists = [quant.get(k) for k in ("ignore", "modules_to_not_convert", "dynamic")]
    entries = [e for found in lists if isinstance(found, list | dict) for e in found if isinstance(e, str)]
    modules = {n.rpartition(".")[0] for n in source.names()}
    if not entries or len(entries) * len(modules) > MOST:
        return
    # As in files, and without or with what comes before the layers in some version of transformers.
    parts = [m.split(".") for m in modules]
    names = {".".join(p[i:]) for p in parts for i in range(3)} | {f"model.{m}" for m in modules}
    unknown = [e for e in entries if not USUAL.search(e) and not _names_one(e, names)]
    if unknown:
        log.warning(
            "quantization_config has entries for modules that are not there, and have no effect: %s%s",
            ", ".join(map(repr, unknown[:3])),
            f" and {len(unknown) - 3} more" if len(unknown) > 3 else "",
        )


def _names_one(entry: str, names: Collection[str]) -> bool:
    if entry in names or any(entry in n for n in names):  # AutoAWQ's are parts of names
        return True
    try:
        return any(patterns.match(re.sub(r"^([-+]:|re:)", "", entry), n) for n in names)
    except FormatError:  # too complicated, or no pattern: the reader says so where it matters
        return True
