"""Which column of rows is read, how a row becomes a text, and what is refused."""

import json

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from bpe_tokenizers import byte_level

from awq_jax import data
from awq_jax.convert import text
from awq_jax.errors import CalibrationError, as_options
from awq_jax.serve import calibration_batches

TALK = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
SHAREGPT = [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "an answer"}]
PARTS = [{"role": m["role"], "content": [{"type": "image"}, {"type": "text", "text": m["content"]}]} for m in TALK]
JOINED = "a question\n\nan answer"
CHAT = "<|user|>a question<|assistant|>an answer"
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
ONLY_PARTS = "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content | selectattr('type', 'equalto', 'text') %}"
ONLY_PARTS += "{{ p.text }}{% endfor %}{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
FUSSY = "{{ raise_exception('no system role') if messages[0].role == 'system' }}" + TEMPLATE


class Bytes:
    """A tokenizer of bytes: 0 ends a text, byte b is b + 2."""

    eos_token_id = 0

    def __call__(self, batch, **_):
        return {"input_ids": [[b + 2 for b in text.encode()] for text in batch]}


def read(source, tokenizer=None, **options):
    got = data.load(source, tokenizer or Bytes(), samples=1, seq_len=400, **options)
    return bytes(int(t) - 2 for t in got.tokens.ravel() if t > 1).decode(), got


def chat_tokenizer(template):
    backend = byte_level("smollm")
    text.surround(backend, "<|endoftext|>", None)
    return text.Tokenizer(backend, {"bos_token": "<|endoftext|>"}, template)


def row(**columns):
    return {"id": "0f" * 400, "n": 3, **columns}


@pytest.mark.parametrize(
    ("rows", "want", "column"),
    [
        ([row(messages=TALK)], JOINED, "column 'messages', messages joined"),
        ([row(conversations=SHAREGPT, source="web" * 500)], JOINED, "column 'conversations'"),
        ([row(messages=PARTS)], JOINED, "column 'messages'"),
        ([row(dialog=TALK)], JOINED, "column 'dialog'"),
        ([row(messages={k: [m[k] for m in TALK] for k in TALK[0]})], JOINED, "column 'messages'"),  # datasets < 4
        ([row(instruction="ask", input="it", output="say")], "ask\n\nit\n\nsay", "Alpaca's columns"),
        ([row(instruction="ask", input="", output="say")], "ask\n\nsay", "Alpaca's columns"),
        ([row(instruction="ask", context=None, response="say")], "ask\n\nsay", "Alpaca's columns"),
        ([row(text="a text", summary="long " * 500)], "a text", "column 'text'"),
        ([row(messages="some text", text="a text")], "a text", "column 'text'"),
        ([row(input_ids=[5, 6, 9], attention_mask=[1, 1, 0])], "\x03\x04", "column 'input_ids'"),
        ([TALK], JOINED, "given texts: "),
        ([SHAREGPT, TALK], JOINED, "given texts: "),
    ],
)
def test_the_column_that_holds_text_is_read_and_named(rows, want, column, tmp_path):
    got, calibration = read(rows)
    assert got.startswith(want)
    assert column in calibration.description
    if column != "given texts: ":
        name = tmp_path / "rows.json"
        name.write_text(json.dumps(rows))
        assert read(name)[0] == got


@pytest.mark.parametrize(
    ("rows", "told", "pick"),
    [
        ([row(body="a text")], "has no column that is known to hold text; it has id, n, body", "id"),
        ([row(chosen=TALK, rejected=TALK)], "it has id, n, chosen, rejected", "chosen"),
        ([{"prompt": "ask " * 9, "completion": "say"}], "it has prompt, completion", "prompt"),
    ],
)
def test_other_columns_are_refused_with_the_option_that_picks_one(rows, told, pick):
    with pytest.raises(CalibrationError, match=told) as caught:
        read(rows)
    assert f'column="{pick}"' in str(caught.value)
    assert f"--calib-column {pick}" in as_options(str(caught.value), caught.value.settings)


def test_a_column_is_picked():
    rows = [row(body="a text", text="another", chosen=TALK, instruction="ask", output="say")]
    for column, want in (("body", "a text"), ("chosen", JOINED), ("instruction", "ask")):
        got, calibration = read(rows, column=column)
        assert got == want
        assert f"column {column!r}" in calibration.description
    with pytest.raises(CalibrationError, match="no column 'nope'; it has id, n, body"):
        read(rows, column="nope")
    with pytest.raises(CalibrationError, match="row 1 has no text in column 'n' but int"):
        read(rows, column="n")
    for source in (["a text"], np.ones((2, 3), int), [[1, 2]], data.load(["a text"], Bytes())):
        with pytest.raises(CalibrationError, match='has no columns: leave column="text" out'):
            read(source, column="text")


def test_null_and_empty_rows_are_skipped_and_counted():
    for rows in (
        [{"text": None}, {"text": "a text"}, {"text": " "}, {"id": 3}, None],
        [
            {"messages": None},
            {"messages": TALK},
            {"messages": []},
            {"messages": [{"role": "user", "content": None}]},
            {},
        ],
        [None, "a text", "", " ", "\n"],
        [None] * 4 + [{"instruction": "ask", "output": "say"}],
    ):
        got, calibration = read(rows)
        assert calibration.skipped == 4
        assert "4 rows without text skipped" in calibration.description
        assert f"begins {got[:60]!r}" in calibration.description
    with pytest.raises(CalibrationError, match="column 'text' has no text: all 2 rows are empty"):
        read([{"text": None}, {"text": ""}], column="text")


@pytest.mark.parametrize("null", [None, "", [], float("nan"), pd.NA])
@pytest.mark.parametrize(("column", "value"), [("text", "a text"), ("messages", TALK)])
def test_a_column_that_only_begins_empty_is_read_rather_than_ids(null, column, value):
    empty = [row(**{column: null})] * 200
    got, calibration = read([*empty, row(**{column: value})])
    assert got == (JOINED if column == "messages" else value)
    assert calibration.skipped == 200
    with pytest.raises(CalibrationError, match=f"column '{column}' has no text: all 200 rows are empty"):
        read(empty)


@pytest.mark.parametrize("length", [300, 3000])
def test_a_text_in_place_of_a_name_is_refused(length):
    with pytest.raises(CalibrationError, match="pass \\[text\\]"):
        read("a text " * (length // 7))


def test_the_chat_template_is_used_and_its_start_token_is_not_doubled():
    t = chat_tokenizer(TEMPLATE)
    for rows in (
        [{"messages": TALK}],
        [{"conversations": SHAREGPT}],
        [{"instruction": "a question", "output": "an answer"}],
    ):
        calibration = data.load(rows, t, samples=1, seq_len=400)
        assert CHAT in t.decode(calibration.tokens[0])
        assert "through the chat template" in calibration.description
        assert (calibration.tokens == t.bos_token_id).sum() == 1
    t.chat_template = ONLY_PARTS  # which drops a content that is no list, without a word
    assert CHAT in t.decode(data.load([TALK], t, samples=1, seq_len=400).tokens[0])
    t.chat_template = DATED  # the same tokens tomorrow, when the run is continued
    assert t.decode(data.load([TALK], t, samples=1, seq_len=400).tokens[0]).startswith(
        "<|endoftext|>26 Jul 2024 a question"
    )


def test_conversations_that_the_template_refuses_are_counted():
    t = chat_tokenizer(FUSSY)
    system = [{"role": "system", "content": "obey"}, *TALK]
    assert data.load([system, TALK], t, samples=1, seq_len=400).skipped == 1
    with pytest.raises(CalibrationError, match=r"all 2 rows are empty; .*no system role"):
        data.load([system, system], t, samples=1, seq_len=400)


def test_data_sets_tables_and_dicts_are_understood():
    columns = {"id": ["x" * 900, "y"], "text": ["one text", None]}
    table = datasets.Dataset.from_dict(columns)
    for source in (
        table,
        table.to_iterable_dataset(),
        table[:],
        datasets.DatasetDict({"test": table.select([1]), "train": table}),
        datasets.DatasetDict({"validation": table}),
        {"train": table.to_list()},
        columns,
        pd.DataFrame(columns),
        pa.table(columns),
        (dict(r) for r in table),
    ):
        got, calibration = read(source)
        assert got == "one text", type(source)
        assert "column 'text'" in calibration.description
        assert calibration.skipped == 1
    assert read(table["text"])[0] == "one text"
    assert read(np.array(["one text"]))[0] == "one text"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"a": [{"text": "x"}], "b": [{"text": "y"}]}, r"splits \['a', 'b'\].*data\['a'\]"),
        ({"text": "one text"}, r"a dict of \{'text': str\}; pass rows"),
        ({"text": ["a", "b"], "id": [1]}, "columns of one length"),
        ({}, "a dict of"),
        ({"train": ["a text"]}, r"it has train: pick one, such as column=\"train\""),
        (pd.DataFrame({"n": [1, 2]}), "known to hold text; it has n$"),
    ],
)  # fmt: skip
def test_other_dicts_are_refused_in_words(source, told):
    with pytest.raises(CalibrationError, match=told):
        read(source)


def test_tables_in_files(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n0,"one, ""quoted""\ntext"\n1,\n', encoding="utf-8-sig")
    got, calibration = read(tmp_path / "a.csv")
    assert got == 'one, "quoted"\ntext'
    assert calibration.skipped == 1
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"messages": TALK}]}))
    assert read(tmp_path / "a.json")[0] == JOINED
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(TALK)}\n{json.dumps(TALK)}\n")
    assert read(str(tmp_path / "a.jsonl"))[0].startswith(JOINED)
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(CalibrationError, match=r"b\.json is not JSON"):
        read(tmp_path / "b.json")
    told, texts = data.read_texts(str(tmp_path / "a.json"), None)
    assert texts == [JOINED]
    assert told.endswith("column 'messages', messages joined; begins 'a question\\n\\nan answer'")


def test_rows_are_not_a_processors_output():
    assert not calibration_batches.are_images([{"text": "x"}])
    assert not calibration_batches.are_images([{"input_ids": [1, 2]}])
    assert calibration_batches.are_images([{"input_ids": np.zeros((1, 2), np.int32)}])
