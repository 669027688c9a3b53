"""``tokenizer.json`` and what lies beside it, read as transformers 4 and ``PreTrainedTokenizerFast`` read them.

How text is split is ``tokenizer.json``'s business alone: transformers 5 rebuilds some classes from their vocabulary,
with other rules for splitting. ``tokenizer_config.json`` says which tokens are special, and holds chat templates.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from awq_jax.convert.text import (
    DEFAULT,
    NAMED,
    TEMPLATE_NAME,
    UNBOUNDED,
    ChatTemplate,
    Tokenizer,
    TokenizerLike,
    surround,
)

# Classes that put the tokens around a text which tokenizer_config.json asks for, whatever tokenizer.json says, and
# whether they begin one unless told otherwise. All others leave it to tokenizer.json. transformers 5 no longer writes
# these settings, so where they are, they are as transformers 4 meant them.
ADDS_BOS = {"Llama": True, "CodeLlama": True, "Gemma": True, "Cohere": True, "GPTNeoX": False}
LISTS = ("additional_special_tokens", "extra_special_tokens")
Settings = Mapping[str, Any]
"""Content of ``tokenizer_config.json``."""


def from_json(directory: Path) -> Tokenizer:
    """The tokenizer of ``tokenizer.json``.

    Raises:
      Exception: whatever damage leads to.
    """
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    settings = settings_of(directory)
    add_listed(backend, directory, settings)
    return finished(backend, directory, settings)


def settings_of(directory: Path) -> Settings:
    """``tokenizer_config.json``, with what older releases keep in ``special_tokens_map.json``."""
    settings = _read(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        return settings
    return settings | _read(directory / "special_tokens_map.json")


def kind_of(settings: Settings) -> str:
    """``Llama`` of ``LlamaTokenizerFast``."""
    return str(settings.get("tokenizer_class")).removesuffix("Fast").removesuffix("Tokenizer")


def add_listed(backend: tokenizers.Tokenizer, directory: Path, settings: Settings) -> None:
    """Add the tokens that the settings, and files beside them, list to those that are matched whole."""
    known = {repr(t) for t in backend.get_added_tokens_decoder().values()}
    added = dict(_added(directory, settings, {t.content for t in backend.get_added_tokens_decoder().values()}))
    mark_special(backend, settings, [t for _, t in sorted(added.items()) if repr(t) not in known])


def mark_special(backend: tokenizers.Tokenizer, settings: Settings, more: Iterable[AddedToken] = ()) -> None:
    """Add the tokens that ``settings`` names, and ``more`` before them, to those that are matched whole."""
    named = {name: _token(value) for name, value in _named(settings).items()}
    tokens = list(more)
    have = {t.content for t in (*backend.get_added_tokens_decoder().values(), *tokens)}
    for token in (*named.values(), *_listed(settings)):
        if token.content not in have:
            tokens.append(token)
            have.add(token.content)
    purposes = {t.content for t in named.values()}
    for token in tokens:
        token.special = token.special or token.content in purposes
    backend.add_tokens(tokens)


def finished(backend: tokenizers.Tokenizer, directory: Path, settings: Settings) -> Tokenizer:
    """The tokenizer of a backend, with all that ``tokenizer_config.json`` says of it."""
    special = {name: _token(value).content for name, value in _named(settings).items()}
    kind = kind_of(settings)
    bos, eos = settings.get("add_bos_token"), settings.get("add_eos_token")
    if kind in ADDS_BOS and (bos is not None or eos is not None):
        begin = ADDS_BOS[kind] if bos is None else bool(bos)
        surround(backend, special.get("bos_token") if begin else None, special.get("eos_token") if eos else None)
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
    length = settings.get("model_max_length")
    return Tokenizer(
        backend,
        special,
        chat_template(directory, settings),
        int(length) if isinstance(length, int | float) and 0 < length < UNBOUNDED else None,
        bool(settings.get("clean_up_tokenization_spaces")),
    )


def adopt(tokenizer: Any) -> TokenizerLike:
    """A transformers tokenizer as ours, if it is backed by the ``tokenizers`` package; else itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        return tokenizer
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    length, clean = tokenizer.model_max_length, bool(tokenizer.clean_up_tokenization_spaces)
    return Tokenizer(backend, special, tokenizer.chat_template, length, clean)


def chat_template(directory: Path, settings: Settings) -> ChatTemplate | None:
    """Of ``chat_template.jinja`` and ``additional_chat_templates/``, else of ``tokenizer_config.json``; else of
    ``chat_template.json``, where processors of models that look at images had theirs."""
    stored = settings.get("chat_template")
    found = {DEFAULT: stored} if isinstance(stored, str) else dict(stored) if isinstance(stored, dict) else {}
    if isinstance(stored, list):
        found = {t["name"]: t["template"] for t in stored if TEMPLATE_NAME.fullmatch(t["name"])}
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (path := directory / "chat_template.jinja").is_file():
        files[DEFAULT] = path
    found |= {name: path.read_text("utf-8") for name, path in files.items()}
    if not found and isinstance(own := _read(directory / "chat_template.json").get("chat_template"), str):
        found = {DEFAULT: own}
    return found[DEFAULT] if set(found) == {DEFAULT} else found or None


def _added(directory: Path, settings: Settings, stored: Set[str]) -> Iterator[tuple[int, AddedToken]]:
    """Tokens by id that were added to the vocabulary, as the settings say."""
    if "added_tokens_decoder" in settings:
        yield from ((int(i), _token(value)) for i, value in settings["added_tokens_decoder"].items())
        return
    special = {_token(value).content for value in _named(settings).values()}
    special |= {t.content for t in _listed(settings)}
    for text, i in _read(directory / "added_tokens.json").items():
        if text not in stored:
            yield int(i), AddedToken(text, normalized=text not in special, special=text in special)


def _named(settings: Settings) -> dict[str, Any]:
    """Tokens by what they are for; besides `NAMED`, those that some models' templates and processors read."""
    others = settings.get("extra_special_tokens")
    named = {k: v for k, v in settings.items() if k in NAMED or k.endswith("_token")}
    named |= others if isinstance(others, dict) else {}
    return {k: v for k, v in named.items() if isinstance(v, str) or (isinstance(v, dict) and "content" in v)}


def _listed(settings: Settings) -> list[AddedToken]:
    """Special tokens that are for nothing in particular."""
    return [_token(t) for key in LISTS if isinstance(settings.get(key), list) for t in settings[key]]


def _token(value: str | Mapping[str, Any]) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    return AddedToken(**{"special": True} | {k: v for k, v in value.items() if k != "__type"})


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise ValueError(f"{path.name} must hold a JSON object; it holds a {type(data).__name__}")
    return data
