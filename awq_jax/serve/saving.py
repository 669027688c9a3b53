"""A model in memory, as a checkpoint on the disk."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from awq_jax import models, paths
from awq_jax.config import AwqConfig
from awq_jax.convert import hub, writing
from awq_jax.convert.config_json import HfConfig
from awq_jax.convert.files.shards import refuse_existing
from awq_jax.convert.source import Source
from awq_jax.convert.text import TokenizerLike
from awq_jax.models.weights import naming
from awq_jax.models.weights import params as model_params
from awq_jax.qtensor import is_quantized

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Saved:
    """What of a `awq_jax.serve.model.Model` goes into a checkpoint, beside the parameters; its attributes."""

    config: models.ModelConfig
    hf_config: HfConfig
    source: Source
    tokenizer: TokenizerLike | None
    settings: AwqConfig | None
    made: Mapping[str, Any] | None  # by `awq_jax.convert.card.of_report`


def push(write: Callable[[Path], object], repo: str, dst: str | Path | None, private: bool, branch: str | None) -> str:
    """See `awq_jax.serve.model.Model.push_to_hub`; ``write``: makes the checkpoint at a path."""
    repo = hub.check(repo)
    if dst is None:
        path = Path(tempfile.mkdtemp(prefix="awq_jax-")) / repo.rpartition("/")[2]
    else:
        path = Path(dst).expanduser().absolute()
    write(path)
    address = hub.upload(path, repo, private=private, branch=branch)
    if dst is None:
        shutil.rmtree(path.parent, ignore_errors=True)
    return address


def save(
    take_params: Callable[[], nnx.State], what: Saved, dst: str | Path, format: str, overwrite: bool, allow_lossy: bool
) -> str:
    """See `awq_jax.serve.model.Model.save`."""
    if format == "auto":  # others are looked at where they are written, before anything is
        refuse_existing(Path(dst).expanduser().absolute(), overwrite)
    params = take_params()
    if format == "auto":
        format, why = "float", ", because no weight is quantized"
        if any(map(is_quantized, paths.flatten(params).values())):
            format, why = writing.first_that_holds(lambda: model_params.tensors(params, what.config), what.hf_config)
        log.info("saving as %s%s", format, why)
    writing.write_checkpoint(
        dst,
        itertools.chain(model_params.tensors(params, what.config), naming.carried(what.source, what.config)),
        what.hf_config,
        format,
        what.settings,
        what.made,
        tokenizer=what.tokenizer,
        extra=what.source,
        overwrite=overwrite,
        allow_lossy=allow_lossy,
    )
    return format
