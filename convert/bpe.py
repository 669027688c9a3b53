"""BPE tokenizers of the ``tokenizers`` package from vocabularies that come without ``tokenizer.json``."""

from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

CONTROL, USER_DEFINED = 3, 4  # token types: special; matched whole, yet ordinary text
SPACE = "\u2581"


def byte_level(
    ids: Mapping[str, int],
    merges: list[tuple[str, str]],
    pattern: str = "",
    *,
    digits: bool = False,
    ignore_merges: bool = False,
) -> tokenizers.Tokenizer:
    """Byte-level BPE, as GPT-2 and after.

    Args:
      ids: by token, in the spelling that makes every byte a letter.
      merges: the first is made first.
      pattern: what text is split by; "" is GPT-2's.
      digits: with GPT-2's pattern, every digit stands alone.
      ignore_merges: a word that is a token is taken as it is.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=dict(ids), merges=merges, ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    first = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")] if pattern else []
    alone = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, *alone, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(tokens: list[str], scores: list[float], unknown: str, prefix: bool) -> tokenizers.Tokenizer:
    """SentencePiece BPE with byte fallback; the merges follow from the pieces' scores.

    Args:
      tokens: pieces by id.
      scores: of each.
      unknown: the piece for what the vocabulary lacks.
      prefix: a space is put before a text.
    """
    vocabulary = {t: i for i, t in enumerate(tokens)}
    merges = merges_from_scores(tokens, scores)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), space] if prefix else [space])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best-scored result first, then by id.

    Args:
      tokens: SentencePiece's pieces, by id.
      scores: of each.
    """
    ids = {t: i for i, t in enumerate(tokens)}
    merges = []
    for i, token in enumerate(tokens):
        cuts = [(token[:c], token[c:]) for c in range(1, len(token))]
        pairs = [(ids[a], ids[b], a, b) for a, b in cuts if a in ids and b in ids]
        merges += [(-scores[i], i, *pair) for pair in sorted(pairs)]
    return [(a, b) for *_, a, b in sorted(merges)]


def mark(tokenizer: tokenizers.Tokenizer, tokens: list[str], kinds: Sequence[int]) -> None:
    """Mark control tokens as special, and user-defined ones as never split."""
    named = list(zip(tokens, kinds, strict=False))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in named if k == CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in named if k == USER_DEFINED])
