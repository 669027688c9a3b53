"""The model ``awq-jax`` of lm-eval; rules of tokens are those of its Hugging Face model (``HFLM``)."""

from __future__ import annotations

import json
import logging
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm.auto import tqdm

from awq_jax.errors import ConfigError
from awq_jax.lm_eval.scoring import Scored, Scorer
from awq_jax.lm_eval.settings import Generation, generation
from awq_jax.serve import model as models
from awq_jax.serve import prompts
from awq_jax.serve.sampling import SEEDS

log = logging.getLogger(__name__)
GENERATED = 8  # rows that are continued at once, unless a batch size is given


@register_model("awq-jax")
class AwqJaxLM(TemplateLM):
    """A checkpoint of any format that `awq_jax.load` reads, behind lm-eval's interface.

    Args (of ``--model_args``):
      pretrained: checkpoint directory, .gguf file or hub id.
      dtype: see `awq_jax.load`; ``auto``: as stored.
      revision: of a hub id.
      batch_size: rows at once; ``auto``: as many as make a forward pass of a few thousand tokens.
      max_batch_size: at most this many with ``auto``.
      max_length: tokens that the model may read (default: its context).
      max_gen_toks: tokens to generate where the task does not say (default: 256).
      add_bos_token: whether texts begin with the token that begins a text (default: as the tokenizer has it).
      prefix_token_id: stands before a text that has nothing before it (default: BOS, else EOS).
      resident: see `awq_jax.load`.
      devices: spread the weights over so many.
      device: accepted for lm-eval; JAX chooses.

    Raises:
      ConfigError: on an unknown or bad argument.
    """

    def __init__(
        self,
        pretrained: str = "",
        dtype: str | None = None,
        revision: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        resident: bool | None = None,
        devices: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ConfigError(f"--model_args has {sorted(unknown)}, which awq-jax has not; python -m pydoc "
                              "awq_jax.lm_eval.lm says what it has")  # fmt: skip
        if not pretrained:
            raise ConfigError("pass --model_args pretrained=DIR")
        size, most = _batch_size(batch_size), _whole("max_batch_size", max_batch_size)
        self.generated_at_once = size or min(GENERATED, most or GENERATED)
        asked = _whole("max_length", max_length)
        self.max_gen_toks = int(max_gen_toks)
        self.model = models.load(
            pretrained, None if dtype in (None, "auto") else dtype, revision=revision, resident=resident, mesh=devices
        )
        if asked and asked > self.model.config.max_length:
            raise ConfigError(f"max_length {asked} is more than the model's {self.model.config.max_length} positions")
        self.max_length = asked or self.model.config.max_length
        self.tokenizer: Any = prompts.needed(self.model.tokenizer)
        self.pretrained, self.add_bos_token, self._prefix = str(pretrained), add_bos_token, prefix_token_id
        if self.prefix_token_id is None:
            raise ConfigError("the tokenizer has neither BOS nor EOS: pass prefix_token_id=ID in --model_args")
        self.batch_size: int | str = size or "auto"
        self.scorer = Scorer(*self.model._weights.serving(), size, most, self.max_length)

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """What a text stands after that has nothing before it."""
        if self._prefix is not None:
            return self._prefix
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the names of lm-eval's caches."""
        return self.pretrained.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids of a text; BOS is not put before a text that begins with it."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        begins = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None and begins and string.startswith(begins):
            special = False
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=special is not False)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without its system message where the template refuses that."""
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))
        except ConfigError:
            without = [m for m in chat_history if m["role"] != "system"]
            if without == chat_history:
                raise
            log.warning("the chat template refuses a system message: it is left out")
            return str(self.tokenizer.apply_chat_template(without, tokenize=False, **options))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:

            def done(i: int, scored: Scored) -> None:
                bar.update()
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], tuple(scored))

            found = self.scorer([(context, continuation) for _, context, continuation in requests], done)
        return [(scored.loglikelihood, scored.greedy) for scored in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log likelihoods of whole texts, in windows that do not overlap."""
        windows: list[tuple[tuple[str, str] | None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            mine = [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            windows += mine
            counts.append(len(mine))
        scored = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(scored)[0] for _ in range(n)) for n in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts, each group of settings in batches of similar length."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        # All are looked at before any is continued.
        settings = {key: generation(requests[rows[0]].args[1], self.max_gen_toks) for key, rows in groups.items()}
        for one in settings.values():
            if not 0 < one.length < self.max_length:
                raise ConfigError(
                    f"{one.length} tokens are to be generated, and the model's context is {self.max_length}, prompt "
                    "included: pass max_gen_toks=N in --model_args, or in --gen_kwargs"
                )
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for key, rows in groups.items():
                room = self.max_length - settings[key].length
                encoded = {i: self.tok_encode(requests[i].args[0])[-room:] for i in rows}
                order = sorted(rows, key=lambda i: -len(encoded[i]))
                for first in range(0, len(order), self.generated_at_once):
                    batch = order[first : first + self.generated_at_once]
                    for i, text in self._continued({i: encoded[i] for i in batch}, settings[key]).items():
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return [texts[i] for i in range(len(requests))]

    def _continued(self, rows: dict[int, list[int]], settings: Generation) -> dict[int, str]:
        """Texts by number of the request; each draws from a seed of its own, so that batches change nothing."""
        vocabulary, special = self.tokenizer.get_vocab(), set(self.tokenizer.all_special_ids)
        # Special tokens are no text: as an end they are ids.
        ends = [vocabulary[s] for s in settings.until if vocabulary.get(s) in special]
        size = min(1 << (len(rows) - 1).bit_length(), self.generated_at_once)  # the last batch is filled up
        numbers = [*rows, *[next(iter(rows))] * (size - len(rows))]
        seed = settings.sampling.get("seed", 0)
        found = self.model.answers(
            [rows[i] for i in numbers],
            max_new_tokens=settings.length,
            stop=settings.until,
            stop_ids=ends,
            **settings.sampling | {"seed": [(seed + i) % SEEDS for i in numbers]},
        )
        texts = {}
        for i, answer in zip(rows, found, strict=False):
            # As HFLM has it: the new tokens alone, without the space that a text's first word does not have.
            text = self.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
            for stop in settings.until:
                text = text.split(stop)[0]
            texts[i] = text
        return texts


def _batch_size(given: int | str | None) -> int | None:
    """None for ``auto``, also with how often it is to be found again (``auto:4``)."""
    if given is None:
        return None
    return None if str(given).partition(":")[0] == "auto" else _whole("batch_size", given)


def _whole(name: str, given: int | str | None) -> int | None:
    if given is None:
        return None
    if not str(given).isdecimal() or int(given) < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1; got {given!r}")
    return int(given)
