"""Generation: against transformers, against a cacheless loop, and piece by piece."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny_checkpoints
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from awq_jax import errors
from awq_jax.convert.source import Info
from awq_jax.serve import generate, prompts, sampling
from awq_jax.serve.detokenize import Detokenizer
from awq_jax.serve.model import from_source


class Memory:
    """A checkpoint in memory, in the shape of `awq_jax.convert.source.Source`."""

    format = "float"
    generation_config = {"eos_token_id": [257, 3]}  # noqa: RUF012

    def __init__(self, model: torch.nn.Module, tokenizer=None):
        self.tensors = {k: v.numpy() for k, v in model.state_dict().items()}
        self.config = model.config.to_dict()
        self._tokenizer = tokenizer

    def names(self):
        return list(self.tensors)

    def info(self, name):
        return Info(self.tensors[name].shape, str(self.tensors[name].dtype), 0)

    def read(self, name):
        return self.tensors[name]

    def tokenizer(self):
        return self._tokenizer


@pytest.fixture(scope="module")
def pair():
    reference = tiny_checkpoints.torch_model("llama", seed=1)
    with jax.default_matmul_precision("highest"):
        yield from_source(Memory(reference, tiny_checkpoints.tokenizer())), reference


def test_greedy_equals_transformers_per_row(pair):
    """Rows of different length in one batch get what transformers gives each one alone."""
    model, reference = pair
    prompts = [[256, 10, 20, 30, 40], [7], [256, *range(60, 71)]]
    ours = model.generator.run(
        model.params, prompts, max_new_tokens=12, sampling=sampling.Sampling(), eos=model.eos_ids()
    )
    assert max(map(len, ours)) == 12
    for prompt, row in zip(prompts, ours, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=[257, 3], pad_token_id=257
        )[0, len(prompt) :].tolist()
        cut = next((i for i, t in enumerate(theirs) if t in (257, 3)), len(theirs))
        assert row == theirs[:cut]


def test_one_compilation_per_bucket(pair):
    model, _ = pair
    generator = type(model.generator)(model.generator.graphdef, model.config)
    for n, steps in ((1, 9), (5, 20), (16, 30)):
        generator.run(model.params, [[9] * n, [8]], max_new_tokens=steps, sampling=sampling.Sampling())
    for temperature in (0.5, 2.0):
        for p in (0.3, 0.9):
            s = sampling.Sampling(temperature, 7, p, seed=int(10 * p))
            generator.run(model.params, [[9], [8]], max_new_tokens=3, sampling=s)
    assert len(generator.by_layer._compiled) == 2
    assert [f for f, *_ in generator.programs].count(generator.step) == 2


def test_seed_decides_and_rows_are_independent(pair):
    model, _ = pair

    def run(prompts, seed):
        s = sampling.Sampling(1.5, 50, 0.95, seed=seed)
        return model.generator.run(model.params, prompts, max_new_tokens=8, sampling=s)

    a = run([[5, 6], [7, 8]], 0)
    assert a == run([[5, 6], [7, 8]], 0)
    assert a != run([[5, 6], [7, 8]], 1)
    assert a[0] == run([[5, 6], [9]], 0)[0]
    # One setting a row: of its own seed, wherever it stands.
    s = sampling.Sampling(1.5, 50, 0.95)
    mixed = model.generator.run(model.params, [[9], [5, 6]], max_new_tokens=8, sampling=[sampling.Sampling(), s])
    assert mixed[1] == a[0]


TEXT = "naïve café — 日本語 🙂 done</s>"


def test_stream_gives_whole_characters():
    """One token per byte: every piece is whole, and together they are the text."""
    tokenizer = tiny_checkpoints.tokenizer()
    text = Detokenizer(tokenizer, tokenizer("où ")["input_ids"])
    pieces = [text.push(i) for i in tokenizer(TEXT)["input_ids"]]
    pieces.append(text.finish())
    assert "".join(pieces) == text.text == TEXT.removesuffix("</s>")
    assert "\ufffd" not in text.text
    assert sum(map(bool, pieces)) == len(text.text)


def test_unfinished_character_is_released_at_the_end():
    tokenizer = tiny_checkpoints.tokenizer()
    text = Detokenizer(tokenizer, [])
    for i in tokenizer("a🙂")["input_ids"][:-1]:
        text.push(i)
    assert text.text == "a"
    assert text.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["lo w"], "hel"),
        (["xyz"], "hello wörld"),
        (["ld", "wörl"], "hello "),
        (["llx", "lo"], "hel"),
        (["h"], ""),
        (["dd"], "hello wörld"),
        (["ö"], "hello w"),
    ],
)
def test_stop_strings(stop, expected):
    """Found across tokens, never streamed in part, and released when they turn out not to come."""
    tokenizer = tiny_checkpoints.tokenizer()
    text, streamed = Detokenizer(tokenizer, [], stop), ""
    for i in tokenizer("hello wörld")["input_ids"]:
        streamed += text.push(i)
        assert expected.startswith(streamed)
        if text.stopped:
            break
    streamed += text.finish()
    assert streamed == text.text == expected
    assert text.stopped == (expected != "hello wörld")


def test_spaces_between_words_survive():
    """A Metaspace tokenizer drops the first space of whatever it decodes; a continuation keeps it, also after many
    special tokens, which are no text."""
    raw = Tokenizer(models.WordLevel({"▁once": 0, "▁upon": 1, "▁a": 2, "<unk>": 3}, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"), [0])
    assert "".join(map(text.push, [1, *[3] * 10, 2])) + text.finish() == " upon a"


def test_long_runs_of_byte_tokens():
    """They decode only from the beginning of a character on, here one that the prompt left unfinished."""
    raw = Tokenizer(models.BPE({f"<0x{i:02X}>": i for i in range(256)}, [], byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    ids = list("👩\u200d👩\u200d👧 日本語".encode())
    text = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=raw), ids[:2])
    pieces = [text.push(i) for i in ids[2:]]
    assert "".join(pieces) == "👩\u200d👩\u200d👧 日本語"
    assert sum(map(bool, pieces)) == 9


def test_generate_streams_and_stops(pair):
    model, _ = pair
    whole = model.generate(["ab", "xyz"], max_new_tokens=20, temperature=1.0, seed=3)
    rows: dict[int, str] = {0: "", 1: ""}

    def stream(piece: str, row: int) -> None:
        rows[row] += piece

    assert model.generate(["ab", "xyz"], max_new_tokens=20, temperature=1.0, seed=3, stream=stream) == whole
    assert list(rows.values()) == whole
    stop = whole[1][2:4]
    cut = model.generate(["ab", "xyz"], max_new_tokens=20, temperature=1.0, seed=3, stop=[stop])
    assert cut[1] == whole[1][: whole[1].find(stop)]
    single: list[str] = []
    assert model.generate("ab", max_new_tokens=5, stream=single.append) == ["".join(single)]


def test_chat_template(pair):
    model, _ = pair
    one = prompts.encode(model.tokenizer, "hi", chat=True)
    assert one == prompts.encode(model.tokenizer, [{"role": "user", "content": "hi"}], chat=True)
    assert model.tokenizer.decode(one[0]) == "<|user|>hi\n<|assistant|>"
    assert (
        model.generate(["hi", "ho"], max_new_tokens=4, chat=True)[0]
        == model.generate("hi", max_new_tokens=4, chat=True)[0]
    )


def test_eos_ids_come_from_every_source(pair):
    assert pair[0].eos_ids() == (3, 257)


def test_bad_requests(pair):
    model, _ = pair
    with pytest.raises(errors.ShapeError, match="no tokens"):
        model.generate([[]])
    with pytest.raises(errors.ShapeError, match="prompt 1: token id 288 is outside the vocabulary of 288"):
        model.generate([[1], [288]])
    with pytest.raises(errors.ShapeError, match="prompt 0 has 64 tokens"):
        model.generate([[1] * 64])
    with pytest.raises(errors.ConfigError, match="max_new_tokens"):
        model.generate("a", max_new_tokens=0)
    with pytest.raises(errors.ConfigError, match="stop string"):
        model.generate("a", stop=["x", ""])
    with pytest.raises(errors.ShapeError, match=r"\[batch, length\]"):
        model([1, 2])
    with pytest.raises(errors.ShapeError, match="outside the vocabulary"):
        model([[1, -1]])
    with pytest.raises(errors.ShapeError, match="integers"):
        model([[1.5]])


def test_answers_say_why_they_end_and_how_long_they_are(pair):
    model, _ = pair
    long, short = model.answers(["ab", "xyz"], max_new_tokens=20, temperature=1.0, seed=[3, 4], logprobs=2)
    assert long.text == model.generate("ab", max_new_tokens=20, temperature=1.0, seed=3)[0]
    assert (long.prompt_tokens, short.prompt_tokens) == (2, 3)
    assert (long.seed, short.seed) == (3, 4)
    assert long.prefill_tokens_per_second > 0
    for answer in (long, short):
        ended = answer.completion_tokens - len(answer.ids)
        assert (answer.finish_reason, ended) in [("length", 0), ("stop", 1)]
        assert (answer.completion_tokens == 20) or ended
        assert answer.decode_tokens_per_second > 0
        # The model's own probabilities of what was drawn, from a pass without a cache.
        whole = model.tokenizer("ab" if answer is long else "xyz").input_ids + list(answer.ids)
        want = jax.nn.log_softmax(model([whole + [0] * (32 - len(whole))])[0], axis=-1)
        for i, told in enumerate(answer.logprobs):
            row = want[answer.prompt_tokens + i - 1]
            assert told.token == answer.ids[i]
            np.testing.assert_allclose(told.logprob, row[told.token], atol=1e-4)
            top = np.argsort(-np.asarray(row))[:2]
            assert [t for t, _ in told.likely] == top.tolist()
            np.testing.assert_allclose([v for _, v in told.likely], row[top], atol=1e-4)
    end = long.ids[2]
    stopped = model.answers(["ab", "xyz"], max_new_tokens=20, temperature=1.0, seed=[3, 4], logprobs=1, stop_ids=end)[0]
    first = long.ids.index(end)
    assert stopped.ids == long.ids[:first]
    assert (stopped.finish_reason, stopped.completion_tokens) == ("stop", first + 1)
    once = model.answers(["ab", "xyz"], max_new_tokens=1)[0]
    assert (once.decode_tokens_per_second, once.logprobs) == (None, None)


def test_penalties_and_biases_as_transformers(pair):
    """Whole answers: prompts count for repetition; padding and other rows do not."""
    model, reference = pair
    rows = [[256, 10, 20, 30, 40], [7, 7]]
    settings = sampling.Sampling(repetition_penalty=1.3, logit_bias={5: 2.5, 257: -100, 3: -100})
    ours = model.generator.run(model.params, rows, max_new_tokens=12, sampling=settings)
    plain = model.generator.run(model.params, rows, max_new_tokens=12, sampling=sampling.Sampling())
    for prompt, row in zip(rows, ours, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=257,
            repetition_penalty=1.3, sequence_bias=[[[5], 2.5], [[257], -100.0], [[3], -100.0]],
        )  # fmt: skip
        assert row == theirs[0, len(prompt) :].tolist()
    assert ours != plain


def test_a_past_is_not_read_again():
    sizes = {"sliding_window": 5, "num_hidden_layers": 1, "max_position_embeddings": 256}
    model = from_source(Memory(tiny_checkpoints.torch_model("mistral", seed=2, **sizes)))
    run, greedy = model.generator.continuations, sampling.Sampling()
    past, talk = generate.Past(), list(range(34))
    for more in ([], [9, 8], [7] * 20):  # the last needs more slots than the first has made
        talk = [*talk, *more]
        (now,) = run(model.params, [talk], max_new_tokens=6, sampling=greedy, past=past)
        assert now.ids == run(model.params, [talk], max_new_tokens=6, sampling=greedy)[0].ids
        assert past.ids == [*talk, *now.ids[:5]]
        talk = [*talk, *now.ids[:3]]  # as where a template writes an answer in another way
    assert [f for f, *_ in model.generator.programs].count(model.generator.extend) == 2
    with pytest.raises(errors.ConfigError, match="one row of text"):
        run(model.params, [[1], [2]], max_new_tokens=2, sampling=greedy, past=past)


def test_generation_stops_at_the_context(pair):
    model, _ = pair
    out = model.generator.run(model.params, [[1] * 60, [2]], max_new_tokens=50, sampling=sampling.Sampling())
    assert [len(r) for r in out] == [4, 50]
