"""How good a model is on text: perplexity, and the divergence of a quantized model from its float model."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import data
from awq_jax.data.tokens import beginning
from awq_jax.errors import CalibrationError, ConfigError, Setting, WeightError
from awq_jax.progress import Progress, bar

# Logits of one forward pass are kept below this many bytes (float32) unless a batch size is given.
LOGIT_BYTES = 256 * 2**20
FEWEST = 4  # windows that a standard error is estimated from
Text = str | Sequence[int] | np.ndarray


class Scorable(Protocol):
    """What evaluation needs of a model; `awq_jax.serve.model.Model` has it.

    A model may have ``forward``, the same function as ``apply``, to be called as it is: of several compiled programs.
    """

    @property
    def params(self) -> Any:
        """Parameters, as `apply` takes them."""

    @property
    def apply(self) -> Callable[..., jax.Array]:
        """Logits ``[B, T, V]`` of tokens ``[B, T]``, pure and causal."""


@dataclasses.dataclass(frozen=True, eq=False)
class Perplexity:
    """Perplexity of a text.

    Attributes:
      ppl: ``exp(nll)``.
      nll: mean negative log likelihood per scored token, in nats.
      standard_error: of ``nll``, from the scatter between windows (tokens of one window are
        correlated); None below `FEWEST` windows, which say too little of it.
      tokens: tokens scored.
      window_nll: float64 ``[W]``, nats summed per window.
      window_tokens: int64 ``[W]``, tokens scored per window.
    """

    ppl: float
    nll: float
    standard_error: float | None
    tokens: int
    window_nll: np.ndarray
    window_tokens: np.ndarray

    def to_dict(self) -> dict[str, object]:
        """Plain JSON data."""
        numbers = {name: getattr(self, name) for name in ("ppl", "nll", "standard_error", "tokens")}
        return numbers | {"windows": len(self.window_nll)}


@dataclasses.dataclass(frozen=True, eq=False)
class Divergence:
    """How far a model's predictions are from a reference model's on the same text.

    Attributes:
      kl: mean KL(reference || model) per token, in nats.
      standard_error: of ``kl``, from the scatter between windows; None below `FEWEST` windows.
      agreement: share of tokens at which both models rank the same token first.
      tokens: tokens compared.
      window_kl: float64 ``[W]``, nats summed per window.
      window_tokens: int64 ``[W]``, tokens compared per window.
    """

    kl: float
    standard_error: float | None
    agreement: float
    tokens: int
    window_kl: np.ndarray
    window_tokens: np.ndarray

    def to_dict(self) -> dict[str, object]:
        """Plain JSON data."""
        return {name: getattr(self, name) for name in ("kl", "standard_error", "agreement", "tokens")}


def perplexity(
    model: Scorable,
    text: Text,
    *,
    context: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    bos: str = "auto",
    progress: Progress = False,
) -> Perplexity:
    """Perplexity of ``model`` on ``text``.

    Windows begin as the model's input does. Where the tokenizer puts BOS before a text, each is BOS and
    ``context - 1`` tokens, and every token of the text is scored exactly once. Else window j reads tokens ``[j*stride,
    j*stride + context)`` and predicts the token after each of them, so that every one but the first is scored.
    Where windows overlap, only those predictions count that no earlier window has made: each (past the first window)
    has at least ``context - stride`` tokens of context. Log likelihoods are taken in float32.

    Args:
      model: anything with ``.apply(params, tokens) -> logits`` and ``.params``.
      text: a string (encoded with ``model.tokenizer``) or integer tokens ``[T]``; BOS at their start is dropped
        where all windows have it.
      context: tokens a window reads, BOS included.
      stride: tokens between windows, 1 ... context (default: as many as a window predicts, the most).
      max_tokens: score at most this many tokens, from the start.
      batch_size: windows per forward pass; by default up to 8, fewer for large vocabularies.
      bos: whether windows begin with BOS: ``"auto"`` (where ``model.tokenizer`` puts it before a text), ``"yes"``,
        ``"no"``.
      progress: show a progress bar on stderr; or call this function with what is done of how much (see
        `awq_jax.progress`).

    Raises:
      CalibrationError: if the text has fewer than two tokens or tokens outside the vocabulary.
      ConfigError: if context, stride, max_tokens or batch_size is out of range, or if there is no BOS where one is
        asked for.
      WeightError: if the logits are not finite.
    """
    measure = scorer(model, text, context=context, stride=stride, max_tokens=max_tokens, batch_size=batch_size, bos=bos)
    return measure(model.params, progress)


def scorer(
    model: Scorable,
    text: Text,
    *,
    context: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    bos: str = "auto",
) -> Callable[[Any, Progress], Perplexity]:
    """`perplexity` of ``model`` with several parameters: ``(params, progress) -> Perplexity``.

    Text and windows are prepared once, and parameters of one structure are scored by one compiled program.

    Args:
      model, text, context, stride, max_tokens, batch_size, bos: as for `perplexity`.

    Raises:
      CalibrationError, ConfigError: as `perplexity`; what is returned raises WeightError if logits are not finite.
    """
    work = _Windows(model, text, context, stride, max_tokens, batch_size, bos)

    forward = _forward(model)

    def score(params: object, tokens: np.ndarray, following: np.ndarray) -> tuple[jax.Array]:
        return (_nll(forward(params, tokens), following),)

    def measure(params: object, progress: Progress) -> Perplexity:
        (window_nll,), window_tokens = work.sums("perplexity", progress, functools.partial(score, params))
        nll, error = _mean(window_nll, window_tokens)
        return Perplexity(_exp(nll), nll, error, int(window_tokens.sum()), window_nll, window_tokens)

    return measure


def kl(
    model: Scorable,
    reference: Scorable,
    text: Text,
    *,
    context: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    bos: str = "auto",
    progress: Progress = False,
) -> Divergence:
    """Mean ``KL(reference || model)`` per token of ``text``, over the windows of `perplexity`.

    Args:
      model: usually the quantized model.
      reference: usually the float model; it must have the same vocabulary.
      text, context, stride, max_tokens, batch_size, bos, progress: as for `perplexity`; a string is
        encoded with ``model.tokenizer``.

    Raises:
      CalibrationError, ConfigError, WeightError: as for `perplexity`.
      ConfigError: if the two models differ in vocabulary size.
    """
    work = _Windows(model, text, context, stride, max_tokens, batch_size, bos)
    check_settings(_limit(reference), work.context)
    other = _vocabulary(reference, work.context)
    if other != work.vocabulary:
        raise ConfigError(f"the models have {work.vocabulary} and {other} tokens; KL needs the same vocabulary")

    ours, theirs = _forward(model), _forward(reference)
    params, reference_params = model.params, reference.params

    def per_token(tokens: np.ndarray, _: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return _divergence(theirs(reference_params, tokens), ours(params, tokens))

    (window_kl, same), window_tokens = work.sums("KL", progress, per_token)
    mean, error = _mean(window_kl, window_tokens)
    total = int(window_tokens.sum())
    return Divergence(mean, error, float(same.sum()) / total, total, window_kl, window_tokens)


def _forward(model: Scorable) -> Callable[..., jax.Array]:
    """Logits of tokens, compiled."""
    forward: Callable[..., jax.Array] = getattr(model, "forward", None) or jax.jit(model.apply)
    return forward


@jax.jit
def _nll(logits: jax.Array, following: jax.Array) -> jax.Array:
    """Negative log likelihood ``[B, T]`` of tokens ``following [B, T]``."""
    logits = logits.astype(jnp.float32)
    gold = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - gold


@jax.jit
def _divergence(reference: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``KL(reference || logits)`` of every token, and whether both rank the same one first."""
    p, q = (jax.nn.log_softmax(a.astype(jnp.float32)) for a in (reference, logits))
    terms = jnp.where(p > -jnp.inf, jnp.exp(p) * (p - q), 0.0)  # masked tokens: 0 log 0 = 0
    return terms.sum(axis=-1), p.argmax(-1) == q.argmax(-1)


M = TypeVar("M", Perplexity, Divergence)


def difference(a: M, b: M) -> tuple[float, float | None]:
    """``a.nll - b.nll``, or ``a.kl - b.kl``, and its standard error, paired by window (of the same text and windows).

    Raises:
      ConfigError: if the windows differ.
    """
    if not np.array_equal(a.window_tokens, b.window_tokens):
        raise ConfigError("the two results are of different windows; use the same text, context and stride")
    lost = [x.window_nll if isinstance(x, Perplexity) else x.window_kl for x in (a, b)]
    return _mean(lost[0] - lost[1], a.window_tokens)


class _Windows:
    """The windows of a text, which are scored in batches of one constant shape."""

    def __init__(
        self,
        model: Scorable,
        text: Text,
        context: int,
        stride: int | None,
        max_tokens: int | None,
        batch_size: int | None,
        bos: str,
    ):
        check_settings(_limit(model), context, stride, max_tokens, batch_size)
        tokens = data.encode(text, getattr(model, "tokenizer", None)) if isinstance(text, str) else np.asarray(text)
        begin = beginning(getattr(model, "tokenizer", None), bos)
        tokens = begin.strip(tokens) if tokens.ndim == 1 else tokens
        check_text(tokens, least=1 if begin.ids else 2)
        if context <= len(begin.ids):
            raise ConfigError(
                f"windows of {context} hold nothing but what they begin with, {begin.text}: a larger context"
            )
        self.head = np.asarray(begin.ids, tokens.dtype)
        self.first = 0 if self.head.size else 1  # to be predicted: a text without a beginning starts with what is not
        self.tokens = tokens if max_tokens is None else tokens[: max_tokens + self.first]
        self.scored = self.tokens.size - self.first
        self.context = min(context, self.scored + self.head.size)
        self.span = self.context - self.head.size  # tokens that a window predicts
        self.stride = min(stride or context, self.span)
        self.vocabulary = _vocabulary(model, self.context)
        check_text(self.tokens, self.vocabulary, least=1)
        self.count = 1 + max(0, math.ceil((self.scored - self.span) / self.stride))
        fits = max(1, LOGIT_BYTES // (4 * self.context * self.vocabulary))
        self.batch_size = min(batch_size or min(8, fits), self.count)

    def sums(
        self, name: str, progress: Progress, per_token: Callable[[np.ndarray, np.ndarray], Sequence[jax.Array]]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Sums over the scored tokens of each window, and how many tokens these are.

        Args:
          name: of the progress bar.
          progress: show it.
          per_token: (tokens, following), int32 ``[B, T]`` each -> arrays ``[B, T]``.

        Returns:
          float64 ``[W]`` for each of the arrays, and int64 ``[W]``.

        Raises:
          WeightError: a value is not finite.
        """
        sums: list[list[np.ndarray]] = []
        with bar(progress, name, "window", self.count, leave=False) as shown:
            for first in range(0, self.count, self.batch_size):
                # The last batch is filled up with windows that do not count.
                window = first + np.arange(self.batch_size)[:, None]
                position = window * self.stride + np.arange(self.span)
                done = np.where(window > 0, (window - 1) * self.stride + self.span, 0)
                counted = (position >= done) & (position < self.scored) & (window < self.count)
                target = self.tokens[self.first + np.minimum(position, self.scored - 1)]
                if self.first:
                    row = [self.tokens[np.minimum(position[:, :1], self.scored - 1)], target]
                else:  # nothing follows the last token that a window predicts: its own prediction does not count
                    row = [np.broadcast_to(self.head, (self.batch_size, self.head.size)), target, target[:, -1:]]
                    counted = np.pad(counted, ((0, 0), (self.head.size - 1, 1)))
                read = np.concatenate(row, axis=1).astype(np.int32)
                found = per_token(read[:, :-1], read[:, 1:])
                values = [np.asarray(a, np.float64) for a in found]
                if not all(np.isfinite(v[counted]).all() for v in values):
                    raise WeightError(
                        "the model's logits are not finite: a weight is damaged, or activations overflow; try dtype "
                        "float32"
                    )
                sums.append([np.where(counted, v, 0).sum(axis=1) for v in (*values, counted)])
                shown.update(min(self.batch_size, self.count - first))
        *totals, counts = (np.concatenate(column)[: self.count] for column in zip(*sums, strict=True))
        return totals, counts.astype(np.int64)


def check_text(tokens: np.ndarray, vocabulary: int | None = None, least: int = 2) -> None:
    """Refuse tokens that cannot be scored: fewer than ``least``, or outside the vocabulary.

    Raises:
      CalibrationError: saying which.
    """
    if tokens.ndim != 1 or tokens.size < least:
        raise CalibrationError(f"the text to score has tokens of shape {tokens.shape}; at least {least} are needed")
    data.check_tokens(tokens, vocabulary, "the text to score")


def check_settings(
    limit: int | None,
    context: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
) -> None:
    """Refuse settings of `perplexity` that are out of range for a model of ``limit`` positions (None: not known).

    Raises:
      ConfigError: naming the setting.
    """
    for name, value in (("context", context), ("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}")
    if limit is not None and context > limit:
        most = Setting("context", limit)
        raise ConfigError(f"context {context} is more than the model's {limit} positions; use {most}", most)
    if stride is not None and not 1 <= stride <= context:
        raise ConfigError(f"stride must be 1 ... context ({context}), or tokens would be left out; got {stride}")


def _limit(model: object) -> int | None:
    limit: int | None = getattr(getattr(model, "config", None), "max_length", None)
    return limit


def _vocabulary(model: Scorable, context: int) -> int:
    tokens = jax.ShapeDtypeStruct((1, context), jnp.int32)
    return int(jax.eval_shape(model.apply, model.params, tokens).shape[-1])


def _mean(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """Mean per token and its standard error, a ratio estimate with windows as the sampling unit."""
    windows, total = len(sums), counts.sum()
    mean = float(sums.sum() / total)
    if windows < FEWEST:
        return mean, None
    scatter = np.sum((sums - counts * mean) ** 2)
    return mean, float(math.sqrt(windows / (windows - 1) * scatter) / total)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
