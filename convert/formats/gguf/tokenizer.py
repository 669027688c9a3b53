"""A tokenizer as GGUF metadata: the inverse of `awq_jax.convert.tokenizer.from_gguf`.

llama.cpp has byte-level BPE with a fixed set of splitting patterns, known by name, and SentencePiece BPE.
The kind is found by the structure of the tokenizer, not by its name; one that llama.cpp would split
in another way is refused, but for what its own converter lets pass: llama.cpp does not normalise (Qwen's
NFC), ignores white space rules of added tokens, and where it puts a space before a text it does so also
after special tokens and before text that begins with a space.
"""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING

from awq_jax.convert import tokenizer_files
from awq_jax.convert.bpe import CONTROL, SPACE, USER_DEFINED, merges_from_scores
from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.text import DEFAULT, Tokenizer
from awq_jax.convert.tokenizer import KEY, SPLITS, TEMPLATE
from awq_jax.errors import CheckpointError, FormatError

if TYPE_CHECKING:
    from awq_jax.convert.text import TokenizerLike

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6  # further token types
OTHER = "; llama.cpp has no such tokenizer: save as another format"
# (pattern, whether a word that is a token is taken as it is) -> tokenizer.ggml.pre
PRE = {
    (SPLITS["llama-bpe"], True): "llama-bpe",
    (SPLITS["smaug-bpe"], False): "smaug-bpe",
    (SPLITS["qwen2"], False): "qwen2",
    (SPLITS["tekken"], True): "tekken",
    ("gpt2", False): "gpt-2",
    ("digits gpt2", False): "smollm",
}
TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")  # found by llama.cpp by their text


def metadata(tokenizer: TokenizerLike | None, config: HfConfig) -> JsonObject:
    """Keys and values for the header of a GGUF file.

    Args:
      tokenizer: one backed by the ``tokenizers`` package (ours, or a fast one of transformers), or None.
      config: ``config.json``: ``vocab_size`` is the number of rows of the embedding, and
        ``eos_token_id`` may list several.

    Returns:
      Strings, bools, ints and lists by key.

    Raises:
      FormatError: llama.cpp has no such tokenizer.
      CheckpointError: it has more tokens than the embedding has rows.
    """
    if tokenizer is None:
        log.warning("there is no tokenizer: llama.cpp will run the model on token ids only")
        return {f"{KEY}model": "no_vocab"}
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer_files.adopt(tokenizer)
    if not isinstance(tokenizer, Tokenizer):
        raise FormatError(f"the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json{OTHER}")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    odd = [k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    if model.get("type") != "BPE" or odd:
        raise FormatError(f"the tokenizer is {model.get('type')}{' with ' + odd[0] if odd else ''}{OTHER}")
    spm = bool(model.get("byte_fallback"))
    tokens, kinds = _tokens(data, config, tokenizer.unk_token if spm else None)
    keys = _spm(data, tokens, kinds) if spm else _bpe(data)
    out = {"model": "llama" if spm else "gpt2", **keys, "tokens": tokens, "token_type": kinds}
    return {f"{KEY}{k}": v for k, v in (out | _special(tokenizer, config)).items()} | _templates(tokenizer)


def _tokens(data: JsonObject, config: HfConfig, unknown: str | None) -> tuple[list[str], list[int]]:
    """Every token by id, and its type; ids without one are padding."""
    size = config.get("vocab_size")
    added = {t["id"]: t for t in data["added_tokens"]}
    by_id = {i: t for t, i in data["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    if type(size) is not int or max(by_id) >= size:
        raise CheckpointError(
            f"the tokenizer has ids up to {max(by_id)}, config.json says that vocab_size is {str(size)[:50]}; the "
            "tokenizer is another model's, or the embedding was not resized"
        )
    kinds = [UNUSED] * size
    for i, token in by_id.items():
        if i in added:
            kinds[i] = CONTROL if added[i]["special"] else USER_DEFINED
        else:
            kinds[i] = BYTE if unknown is not None and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL
        if token == unknown:
            kinds[i] = UNKNOWN
    ruled = [t["content"] for t in added.values() if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if ruled:
        log.warning("llama.cpp ignores the white space rules of %d added tokens, e.g. %r", len(ruled), ruled[0])
    return [by_id.get(i, f"[PAD{i}]") for i in range(size)], kinds


def _bpe(data: JsonObject) -> JsonObject:
    """Byte-level BPE."""
    model, steps = data["model"], _flat(data.get("pre_tokenizer"), "pretokenizers")
    rule = (_pattern(steps), bool(model.get("ignore_merges")))
    if rule not in PRE:
        raise FormatError(f"the tokenizer splits text by {json.dumps(data.get('pre_tokenizer'))[:400]}{OTHER}")
    pre = PRE[rule]
    normal = [n["type"] for n in _flat(data.get("normalizer"), "normalizers")]
    if normal and not (normal == ["NFC"] and pre == "qwen2"):
        raise FormatError(f"the tokenizer normalises text by {', '.join(normal)}{OTHER}")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    if any(len(m) != 2 or " " in m[0] + m[1] for m in merges):
        raise FormatError(f"the tokenizer merges tokens that contain spaces{OTHER}")
    # An array cannot be empty, and llama.cpp wants one: "" joins nothing.
    return {"pre": pre, "merges": [f"{a} {b}" for a, b in merges] or [""]}


def _pattern(steps: list[JsonObject]) -> str:
    """How text is split, as a key of `PRE`; "" if in no known way."""
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return ""
    *first, level = steps
    if level.get("use_regex", True):
        digits = [{"type": "Digits", "individual_digits": True}]
        return {0: "gpt2", 1: "digits gpt2" if first == digits else ""}.get(len(first), "")
    if len(first) != 1 or first[0].get("type") != "Split":
        return ""
    split = first[0]
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return ""
    return str(split.get("pattern", {}).get("Regex", ""))


def _spm(data: JsonObject, tokens: list[str], kinds: list[int]) -> JsonObject:
    """SentencePiece BPE: a token's score is the rank of the first merge that makes it."""
    prefix = _prefix(data)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in data["model"]["merges"]]
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    # What no merge makes is only found as a single character, whatever its score.
    scores = [-float(rank.get(t, len(merges))) for t in tokens]
    hidden = {t for t, k in zip(tokens, kinds, strict=True) if k not in (NORMAL, BYTE)}
    implied = {m for m in merges_from_scores(tokens, scores) if "".join(m) not in hidden}
    given = {m for m in merges if "".join(m) not in hidden}
    if implied != given:
        odd = sorted(implied ^ given)
        raise FormatError(
            f"the tokenizer's merges do not follow from its vocabulary, as SentencePiece's do ({len(odd)} differ, e.g. "
            f"{' + '.join(odd[0])!r}){OTHER}"
        )
    return {"pre": "default", "add_space_prefix": prefix, "scores": scores}


def _prefix(data: JsonObject) -> bool:
    """Whether a space is put before the text."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normal = _flat(data.get("normalizer"), "normalizers")
    steps = _flat(data.get("pre_tokenizer"), "pretokenizers")
    if not steps and normal in ([prepend, replace], [replace]):
        return len(normal) == 2
    if not normal and len(steps) == 1 and steps[0].get("type") == "Metaspace":
        scheme = steps[0].get("prepend_scheme", "always")
        if steps[0].get("replacement") == SPACE and not steps[0].get("split", True):
            if scheme != "never":
                log.warning("llama.cpp puts a space before text that begins with one, and after each special token")
            return bool(scheme != "never")
    raise FormatError(
        f"the tokenizer prepares text by {json.dumps(data.get('normalizer'))[:300]} and "
        f"{json.dumps(data.get('pre_tokenizer'))[:300]}{OTHER}"
    )


def _special(tokenizer: Tokenizer, config: HfConfig) -> JsonObject:
    """Ids of special tokens, and which surround a text."""
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    ids |= {"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    ends = config.get("eos_token_id")
    others = [i for i in ends if type(i) is int and i != ids["eos"]] if isinstance(ends, list) else []
    if others and tokenizer.eos_token not in TURN:
        ids["eot"] = others[0]
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for bos in (False, True):
        for eos in (False, True):
            if whole == [ids["bos"]] * bos + plain + [ids["eos"]] * eos:
                found = {f"{k}_token_id": v for k, v in ids.items() if v is not None}
                return found | {"add_bos_token": bos, "add_eos_token": eos}
    raise FormatError(f"the tokenizer puts tokens around a text that are not its bos and eos: {whole}{OTHER}")


def _templates(tokenizer: Tokenizer) -> JsonObject:
    """The chat template, and those that have names, as llama.cpp's converter stores them."""
    have = tokenizer.chat_template or {}
    named = {DEFAULT: have} if isinstance(have, str) else dict(have)
    default = {TEMPLATE: named.pop(DEFAULT)} if DEFAULT in named else {}
    names = {f"{TEMPLATE}s": sorted(named)} if named else {}
    return {**default, **names, **{f"{TEMPLATE}.{name}": template for name, template in named.items()}}


def _flat(step: JsonObject | None, inside: str) -> list[JsonObject]:
    """A step, or the steps of a sequence, without the settings that change nothing."""
    steps = [] if step is None else [step]
    while any(s.get("type") == "Sequence" for s in steps):
        steps = [t for s in steps for t in (s[inside] if s.get("type") == "Sequence" else [s])]
    return steps
