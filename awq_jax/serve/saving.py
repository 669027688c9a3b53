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
from awq_jax.models.weights import modules, naming
from awq_jax.models.weights import params as model_params
from awq_jax.qtensor import is_quantized
from awq_jax.report import FoldedScale

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
    scales: Mapping[str, FoldedScale] | None  # by path; None: not quantized since it was loaded


class Pushed:
    """What can be saved can be sent to the hub."""

    def save(self, dst: str | Path, format: str = "auto", overwrite: bool = False, allow_lossy: bool = False) -> str:
        """Write a checkpoint."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo: str,
        dst: str | Path | None = None,
        *,
        format: str = "auto",
        allow_lossy: bool = False,
        private: bool = False,
        revision: str | None = None,
    ) -> str:
        """`save`, and send what was written to the Hugging Face hub, as the user of ``hf auth login`` or ``HF_TOKEN``.

        Args:
          repo: ``owner/name``; created if it is not there, ``private`` or not.
          dst: as for `save`; None: a temporary directory, which is kept only if the upload fails.
          format, allow_lossy: as for `save`.
          revision: branch to send it to, created if it is not there; None: the main one.

        Returns:
          The address of the repository.

        Raises:
          CheckpointError: nobody is logged in, or may not write to ``repo`` (before anything is written); or the
            upload failed: the local copy is whole, and the message names the command that sends it again.
          FormatError: see `save`.
        """
        repo = hub.check(repo)
        if dst is None:
            path = Path(tempfile.mkdtemp(prefix="awq_jax-")) / repo.rpartition("/")[2]
        else:
            path = Path(dst).expanduser().absolute()
        self.save(path, format, allow_lossy=allow_lossy)
        address = hub.upload(path, repo, private=private, branch=revision)
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
        None if what.scales is None else modules.folded_scales(what.scales, what.config),
        tokenizer=what.tokenizer,
        extra=what.source,
        overwrite=overwrite,
        allow_lossy=allow_lossy,
    )
    return format
