"""Text to token ids and back: `Tokenizer`, one class whatever the checkpoint's files were."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import tokenizers

from awq_jax.errors import ConfigError

UNBOUNDED = int(1e30)  # what transformers says where no length is known
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATE_NAME = re.compile(r"\w[\w.-]*")  # becomes a file name
DEFAULT, TOOLS = "default", "tool_use"
Message = Mapping[str, object]
"""``{"role", "content"}``; content is a text or a list of parts, and templates may read further keys."""
ChatTemplate = str | dict[str, str]
Ids = int | Sequence[int] | np.ndarray


class TextTokenizer(Protocol):
    """What calibration texts need of a tokenizer: a `Tokenizer`, or any of transformers."""

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, if there is one."""

    def __call__(self, text: list[str], *, verbose: bool = ...) -> Mapping[str, Any]:
        """``input_ids``, a list for each text, with the special tokens that it adds by itself."""


class TokenizerLike(TextTokenizer, Protocol):
    """What this package asks of a model's tokenizer: a `Tokenizer`, or any of transformers."""

    @property
    def chat_template(self) -> ChatTemplate | None:
        """Jinja source, or several by name."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Text of ids."""

    def apply_chat_template(
        self, conversation: Sequence[Message], *, add_generation_prompt: bool, return_dict: bool
    ) -> Any:
        """Ids of a conversation, ``[T]``; in a dict if ``return_dict``."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write its files."""


class Encoded(dict[str, "list[int] | list[list[int]] | np.ndarray"]):
    """``input_ids`` and ``attention_mask``, as keys and as attributes."""

    @property
    def input_ids(self) -> list[int] | list[list[int]] | np.ndarray:
        """Token ids: of one text ``[T]``, of several a list of such or an array ``[B, T]``."""
        return self["input_ids"]

    @property
    def attention_mask(self) -> list[int] | list[list[int]] | np.ndarray:
        """1 for a token, 0 for padding."""
        return self["attention_mask"]


class Tokenizer:
    """A tokenizer that splits as its ``tokenizers`` backend says, whatever class a checkpoint names.

    The methods are those of transformers' tokenizers that prompts, texts and chats need, and do the same.

    Args:
      backend: of the ``tokenizers`` package; what it cuts and pads by itself is switched off.
      special: tokens by what they are for: `NAMED`, and others that chat templates may read.
      chat_template: Jinja source, or several by name.
      max_length: tokens the model was made for; said, not enforced.
      clean_up: whether `decode` drops spaces before punctuation, which word-piece vocabularies leave.

    Attributes:
      bos_token, eos_token, unk_token, pad_token: or None.
      chat_template, backend_tokenizer, model_max_length: as given.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
        max_length: int | None = None,
        clean_up: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.model_max_length = max_length or UNBOUNDED
        # Byte-level text has its spaces right: cleaned up it would be another.
        self.clean_up_tokenization_spaces = clean_up and not isinstance(backend.model, tokenizers.models.BPE)
        self._others = dict(special or {})
        four = (self._others.pop(f"{name}_token", None) for name in ("bos", "eos", "unk", "pad"))
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = four

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Special tokens by what they are for; what chat templates can read."""
        four = {"bos": self.bos_token, "eos": self.eos_token, "unk": self.unk_token, "pad": self.pad_token}
        return {f"{k}_token": v for k, v in four.items() if v is not None} | self._others

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self._id(self.eos_token)

    @property
    def unk_token_id(self) -> int | None:
        """Id of the token that stands for what the vocabulary lacks."""
        return self._id(self.unk_token)

    @property
    def pad_token_id(self) -> int | None:
        """Id of the token that fills rows up."""
        return self._id(self.pad_token)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that `decode` skips if it is to skip special tokens."""
        return [i for i, t in self.backend_tokenizer.get_added_tokens_decoder().items() if t.special]

    @property
    def vocab_size(self) -> int:
        """Tokens without the added ones; `len` counts all."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        kind = type(self.backend_tokenizer.model).__name__
        return f"Tokenizer({kind}, {len(self)} tokens, {self.special_tokens_map})"

    def get_vocab(self) -> dict[str, int]:
        """Id by token, added ones included."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> Encoded:
        """Ids of a text, or of several.

        Args:
          text: one or a list.
          add_special_tokens: with those that begin and end a text, if the model wants any.
          padding: fill rows up to the longest, on the right, with the pad token.
          truncation: cut rows after ``max_length`` tokens.
          max_length: see ``truncation``.
          return_tensors: ``"np"`` makes arrays ``[B, T]``; rows must be of one length.
          verbose: ignored (transformers' tokenizers warn of long texts).

        Raises:
          ConfigError: something else than text, rows that make no array, or padding without a pad token.
        """
        one = isinstance(text, str)
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(t, str) for t in texts):
            raise ConfigError(f"a tokenizer takes a text or a list of texts; got {str(text)[:100]!r}")
        for t in texts:
            try:
                t.encode()
            except UnicodeEncodeError as e:
                # How Python holds bytes of the command line that are no UTF-8.
                raise ConfigError(f"character {e.start} of a text is no character: bytes that are not UTF-8?") from None
        if return_tensors not in (None, "np"):
            raise ConfigError(f'return_tensors is "np" or None; got {return_tensors!r}')
        rows = [e.ids for e in self.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
        if truncation and max_length is not None:
            rows = [r[:max_length] for r in rows]
        masks = [[1] * len(r) for r in rows]
        if padding and rows:
            if (fill := self.pad_token_id) is None:
                raise ConfigError("padding needs a pad token: set tokenizer.pad_token = tokenizer.eos_token")
            longest = max(map(len, rows))
            masks = [m + [0] * (longest - len(m)) for m in masks]
            rows = [r + [fill] * (longest - len(r)) for r in rows]
        if return_tensors is None:
            return Encoded(input_ids=rows[0] if one else rows, attention_mask=masks[0] if one else masks)
        if len({len(r) for r in rows}) > 1:
            raise ConfigError("texts of different lengths make no array: pass padding=True, or one text at a time")
        return Encoded(input_ids=np.array(rows, np.int64), attention_mask=np.array(masks, np.int64))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of one text; see `__call__`."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text as the vocabulary spells them."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).tokens

    def decode(
        self, token_ids: Ids, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """Text of ids ``[T]``, or of one; ids that the vocabulary lacks are left out."""
        ids = np.asarray(token_ids).reshape(-1) if np.ndim(token_ids) < 2 else np.asarray(token_ids)
        if ids.ndim > 1:
            raise ConfigError(f"decode takes one row of ids; got shape {ids.shape}: use batch_decode")
        text = self.backend_tokenizer.decode(ids.astype(np.int64).tolist(), skip_special_tokens=skip_special_tokens)
        clean = clean_up_tokenization_spaces
        return _clean(text) if (self.clean_up_tokenization_spaces if clean is None else clean) else text

    def batch_decode(self, sequences: Sequence[Ids] | np.ndarray, skip_special_tokens: bool = False) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in sequences]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """Id of a token, or of each; the unknown token's where there is none."""
        if isinstance(tokens, str):
            found = self.backend_tokenizer.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self._id_or_unknown(t) for t in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        """Token of an id, or of each, as the vocabulary spells it."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(int(i)) for i in ids]

    def get_chat_template(self, name: str | None = None, tools: object = None) -> str:
        """The chat template in use: ``name`` (or itself Jinja), or the one for tools, or the default.

        Raises:
          ConfigError: there is none.
        """
        have = self.chat_template
        if isinstance(have, str) or have is None:
            if (name or have) is None:
                raise ConfigError("the tokenizer has no chat template: pass chat_template, or the prompt as text")
            return str(name or have)
        if name is not None:
            return have.get(name, name)
        for choice in (TOOLS, DEFAULT) if tools is not None else (DEFAULT,):
            if choice in have:
                return have[choice]
        raise ConfigError(f"the tokenizer has no default chat template; pass chat_template, one of {sorted(have)}")

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        tools: Sequence[Mapping[str, object] | Callable[..., object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str | None = None,
        **variables: object,
    ) -> str | list[str] | list[int] | list[list[int]] | np.ndarray | Encoded:
        """A conversation through the chat template.

        Args:
          conversation: ``{"role", "content"}``, one after another; or several of such.
          chat_template: the name of one of several, or Jinja source.
          tokenize: ids; else the text.
          return_dict: ids as `__call__` gives them; else bare.
          return_tensors: see `__call__`.
          tools, documents, add_generation_prompt, continue_final_message, variables: see
            `awq_jax.convert.chat_template.render`.

        Raises:
          ConfigError: there is no template, it does not take these messages, or an argument is unknown.
        """
        from awq_jax.convert import chat_template as chat  # jinja2 takes a while to import

        for name in ("padding", "truncation", "max_length", "tokenizer_kwargs", "return_assistant_tokens_mask"):
            if variables.pop(name, None):
                raise ConfigError(f"apply_chat_template has no {name}: take the text (tokenize=False) and encode it")
        template = self.get_chat_template(chat_template, tools)
        several = bool(conversation) and isinstance(conversation[0], list | tuple)
        talks = cast(Sequence[Sequence[Mapping[str, object]]], conversation if several else [conversation])
        texts = [
            chat.render(
                template,
                talk,
                tools,
                documents,
                add_generation_prompt,
                continue_final_message,
                **{**self.special_tokens_map, **variables},
            )
            for talk in talks
        ]
        text = texts if several else texts[0]
        if not tokenize:
            return text
        encoded = self(text, add_special_tokens=False, return_tensors=return_tensors)
        return encoded if return_dict else encoded.input_ids

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and chat templates, which transformers reads too."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend_tokenizer.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.special_tokens_map,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            **({} if self.model_max_length == UNBOUNDED else {"model_max_length": self.model_max_length}),
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        templates = {DEFAULT: self.chat_template} if isinstance(self.chat_template, str) else self.chat_template or {}
        for name, template in templates.items():
            path = directory / ("chat_template.jinja" if name == DEFAULT else f"additional_chat_templates/{name}.jinja")
            path.parent.mkdir(exist_ok=True)
            path.write_text(template, encoding="utf-8")

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def _id_or_unknown(self, token: str) -> int | None:
        found = self.backend_tokenizer.token_to_id(token)
        return self.unk_token_id if found is None else found


def ids_of(tokenizer: TextTokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text, with the special tokens that the tokenizer adds by itself."""
    # verbose=False: no warning about texts longer than the model, which are cut later.
    rows: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    return rows


def surround(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Begin and end every encoded text with these tokens, and no others."""
    around = [t for t in (bos, eos) if t is not None]

    def template(n: int) -> list[str]:
        pieces = [bos, f"${'AB'[n]}", eos]
        return [f"{p}:{n}" for p in pieces if p is not None]

    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=template(0),
        pair=template(0) + template(1),
        special_tokens=[(t, backend.token_to_id(t)) for t in dict.fromkeys(around)],
    )


def _clean(text: str) -> str:
    for old in (" .", " ?", " !", " ,"):
        text = text.replace(old, old[1:])
    text = text.replace(" ' ", "'")
    for old in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(old, old[1:])
    return text
