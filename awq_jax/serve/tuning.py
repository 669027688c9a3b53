"""`tune`: a packed model's scales, tuned by the float model's predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from awq_jax import data, paths
from awq_jax.config import SAMPLES, SEQ_LEN
from awq_jax.convert import registry
from awq_jax.errors import ConfigError
from awq_jax.models.weights import naming
from awq_jax.models.weights.params import Weights
from awq_jax.progress import Progress
from awq_jax.qtensor import is_quantized
from awq_jax.serve import calibration_batches
from awq_jax.serve.model import Model
from awq_jax.stream import tuning
from awq_jax.stream.decoder_blocks import Chain, Read, from_checkpoint, from_memory, shapes
from awq_jax.stream.job import check_float


def tune(
    model: Model,
    against: Model | str | Path,
    calib: data.CalibrationSource | None = None,
    *,
    samples: int = SAMPLES,
    seq_len: int = SEQ_LEN,
    seed: int = 0,
    column: str | None = None,
    bos: str = "auto",
    progress: Progress = True,
    **settings: Any,
) -> tuning.Tuned:
    """Lower the divergence of a packed model from its float model, in place: by its scales, norms and biases.

    Codes stay as they are, and so does the format. One sequence in eight, at least one, is kept out: the epoch that is
    best there is taken, and if none is better than no tuning, nothing changes. Each step goes through the model four
    times; `awq_jax.stream.tuning` says how, and how much memory it takes.

    Args:
      model: packed: of any format, and by whomever quantized.
      against: its float model, or the checkpoint of it, which is then read one block at a time.
      calib, samples, seq_len, seed, column, bos: text, as for `awq_jax.serve.model.Model.quantize`. None: the built-in.
      progress: show a progress bar on stderr; or call this function with what is done of how much.
      **settings: of `awq_jax.stream.tuning.Settings`: epochs, batch_size, learning_rate.

    Returns:
      The divergence before and after, by epoch, and the parameters, which are in ``model`` by then.

    Raises:
      ConfigError: nothing is packed, the models differ, or a setting is out of range.
      CalibrationError: see `awq_jax.data.load`; or there are fewer than two sequences.
    """
    unknown = set(settings) - {"epochs", "batch_size", "learning_rate"}
    if unknown:
        raise ConfigError(f"unknown settings {sorted(unknown)}: there are epochs, batch_size, learning_rate")
    how = tuning.Settings(seed=seed, **settings)
    if model.mesh is not None or model.adapters:
        raise ConfigError("tune a model without mesh= and without adapters")
    read = _floats(model, against)
    text = data.default(True) if calib is None else calib
    given = calibration_batches.of_text(model.config, model.tokenizer, text, samples, seq_len, seed, column, bos)
    rows = tuning.same_length(given.batches(None))
    params = model.take_params()
    done = tuning.tune(model.config, paths.flatten(params), read, rows, how, progress)
    model.params = paths.map_with_path(lambda path, _: done.leaves[path], params)
    return done


def _floats(model: Model, against: Model | str | Path) -> Read:
    """What reads a block's float parameters."""
    if isinstance(against, Model):
        theirs, floats = against.config, paths.flatten(against.take_params())
        if any(map(is_quantized, floats.values())):
            raise ConfigError("against= is packed: pass the float model")
        read = from_memory(floats)
    else:
        source = registry.open_source(against)
        check_float(source)
        theirs = naming.config_of(source)
        read = from_checkpoint(Weights(source, theirs, shapes(Chain(theirs).blocks), None))
    own = model.config
    if (theirs.family, theirs.layers, theirs.hidden_size) != (own.family, own.layers, own.hidden_size):
        raise ConfigError(
            f"against= is another model: {len(theirs.layers)} layers of {theirs.hidden_size} ({theirs.family}), and "
            f"the packed one has {len(own.layers)} of {own.hidden_size} ({own.family}); pass the one it was made of"
        )
    return read
