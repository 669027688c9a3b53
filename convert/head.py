"""A head that a checkpoint stores although its config says that it is the embedding: kept if it differs, else once.

The rule of transformers 5 (``PreTrainedModel.tie_weights``): what is stored counts, and then what the config says.
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator

import jax
import numpy as np

from awq_jax.convert.config_json import HfConfig, is_tied, may_be_tied, with_tied
from awq_jax.convert.files.slices import Tensor
from awq_jax.convert.source import SliceReader, Source
from awq_jax.errors import AwqError, ConfigError
from awq_jax.qtensor import QuantizedTensor

log = logging.getLogger(__name__)

HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$|^output\.weight$")
EMBEDDING = re.compile(r"^(?!.*\.\d+\.)(.*\.)?(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings)\.weight$")
BLOCK = 16 << 20  # numbers compared at a time


def settle(source: Source) -> None:
    """Make the config of a source say what its tensors do: a head that differs from the embedding is one of its own.

    Warns where that contradicts what the config said. Afterwards, a head that is stored in spite of
    `awq_jax.convert.config_json.is_tied` is a copy of the embedding: `copies` names it.
    """
    try:
        tied = is_tied(source.config)
    except ConfigError:
        return  # said to whoever needs the model
    names = source.names()
    heads = [n for n in names if HEAD.search(n)]
    if not heads and not tied and may_be_tied(source.config):
        source.config = with_tied(source.config, True)  # the whole says no and its text part yes: there is no other
    if not tied:
        return
    for name in heads:
        embedding = embedding_of(name, names)
        biased = name.removesuffix("weight") + "bias" in names  # phi, gptj: more than the embedding, then
        if embedding is not None and (biased or not _same(source, name, embedding)):
            warn(name, embedding)
            source.config = with_tied(source.config, False)


def copies(config: HfConfig, names: Collection[str]) -> set[str]:
    """Those of a settled source's tensors that are not stored again: heads that are the embedding."""
    if not is_tied(config):
        return set()
    return {n for n in names if HEAD.search(n) and embedding_of(n, names) is not None}


def told(config: HfConfig, names: Collection[str]) -> HfConfig:
    """The config of a checkpoint that stores the tensors ``names``: a head beside the embedding is one of its own."""
    own = any(HEAD.search(n) and embedding_of(n, names) is not None for n in names)
    return with_tied(config, False) if own and may_be_tied(config) else config


def without_copies(config: HfConfig, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """``tensors`` but for a head that is the embedding, if the config says so; a head comes last, and is waited for."""
    if not is_tied(config):
        yield from tensors
        return
    heads: dict[str, Tensor] = {}
    embeddings: dict[str, Tensor] = {}
    for name, value in tensors:
        if HEAD.search(name):
            heads[name] = value
            continue
        if EMBEDDING.search(name):
            embeddings[name] = value
        yield name, value
    for name, value in heads.items():
        embedding = embedding_of(name, embeddings)
        if embedding is None or not _equal(value, embeddings[embedding]):
            if embedding is not None:
                warn(name, embedding)
            yield name, value


def embedding_of(head: str, names: Collection[str]) -> str | None:
    """The embedding of the tokens that a head would be: of several, that whose name is most like the head's."""
    found = [n for n in names if EMBEDDING.search(n)]

    def likeness(name: str) -> int:
        return next((i for i, pair in enumerate(zip(name, head, strict=False)) if len(set(pair)) > 1), len(name))

    return max(found, key=likeness, default=None)


def warn(head: str, embedding: str) -> None:
    """Say that a head is kept."""
    log.warning(
        "config.json says that the head is the embedding, but %s is stored and differs from %s: it is kept",
        head,
        embedding,
    )


def _same(source: Source, head: str, embedding: str) -> bool:
    """Whether two tensors are equal; one that cannot be read is not, and says so when it is needed."""
    one, other = source.info(head), source.info(embedding)
    if one.shape != other.shape or (one.packed is None) != (other.packed is None):
        return False
    try:
        if one.packed is not None:
            return _equal(source.read(head), source.read(embedding))
        readers, rows = (SliceReader(source), SliceReader(source)), max(1, BLOCK // one.shape[1])
        for start in range(0, one.shape[0], rows):
            index = (slice(start, min(start + rows, one.shape[0])), slice(0, one.shape[1]))
            if not _equal(*(r.read(n, index) for r, n in zip(readers, (head, embedding), strict=True))):
                return False
    except AwqError:
        return False
    return True


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; packed ones, the same codes and tables."""
    if isinstance(a, QuantizedTensor) or isinstance(b, QuantizedTensor):
        (one, kind), (other, other_kind) = jax.tree.flatten(a), jax.tree.flatten(b)
        return len({kind, other_kind}) == 1 and all(map(np.array_equal, one, other))
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype:
        a, b = a.astype(np.float64), b.astype(np.float64)
    return np.array_equal(a, b)
