import json
import sys
from pathlib import Path

import numpy as np
import pytest

from awq_jax import data
from awq_jax.data import sources
from awq_jax.errors import CalibrationError


class Bytes:
    """A tokenizer of bytes: token 1 starts a text, 0 ends one, byte b is b + 2."""

    eos_token_id: int | None = 0

    def __call__(self, batch, **_):
        return {"input_ids": [[1, *(b + 2 for b in text.encode())] for text in batch]}


class NoEnd(Bytes):
    eos_token_id = None


def text_of(tokens):
    return bytes(int(t) - 2 for t in np.ravel(tokens) if t > 1).decode()


def test_short_texts_are_packed_with_end_tokens_between():
    got = data.load(["ab", "cd", "ef"], Bytes(), samples=10, seq_len=4)
    flat = got.tokens.ravel().tolist()
    assert got.tokens.shape == (2, 4)
    assert got.tokens.dtype == np.int32
    # three texts of 2 tokens and two end tokens: 8 tokens, 2 of them left over; two sequences of 3 and their start
    assert got.left_tokens == 2
    assert flat.count(0) == 2
    assert flat[0] == flat[4] == 1
    assert flat.count(1) == 2
    assert flat[3] == 0
    assert got.used_tokens == 8
    assert "each sequence begins with token 1" in got.description
    assert "10 sequences wanted" in got.description
    assert "2 tokens" in got.description


def test_without_end_token_texts_follow_each_other():
    got = data.load(["ab", "cd"], NoEnd(), samples=1, seq_len=5)
    assert sorted(got.tokens.ravel().tolist()) == sorted([1, *(b + 2 for b in b"abcd")])


def test_long_text_is_cut_and_nothing_is_lost():
    text = "".join(f"line number {i}\n" for i in range(200))
    got = data.load([text], Bytes(), samples=10_000, seq_len=16)
    assert got.left_characters == 0
    assert got.left_tokens < 16
    # cuts fall after a line, so every line of the text is found whole, up to the tokens left over
    lines = text_of(got.tokens).splitlines()
    assert set(lines[:-1]) <= set(text.splitlines())
    assert len(lines) >= 198


def test_samples_are_spread_over_a_long_text_and_the_rest_is_accounted_for():
    text = "".join(f"<{i:04d}> some words\n" for i in range(2000))
    got = data.load([text], Bytes(), samples=64, seq_len=64, seed=0)
    assert got.tokens.shape == (64, 64)
    numbers = [int(w[1:5]) for w in text_of(got.tokens).split() if len(w) == 6 and w[0] == "<" and w[-1] == ">"]
    assert max(numbers) - min(numbers) > 500
    assert got.left_characters > 0.8 * (len(text) - got.used_tokens)
    assert "characters (not needed)" in got.description


def test_same_seed_same_tokens_other_seed_other_tokens():
    documents = [f"document {i} with its own words" for i in range(50)]
    a, b, c = (data.load(documents, Bytes(), samples=4, seq_len=32, seed=s).tokens for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_fewer_tokens_than_a_sequence_make_a_shorter_one():
    got = data.load(["hello"], Bytes(), samples=4, seq_len=512)
    assert got.tokens.shape == (1, 6)
    assert "shorter" in got.description


def test_token_lists_are_packed_and_arrays_used_as_they_stand():
    got = data.load([[5, 6], [7], np.array([8, 9, 10])], Bytes(), samples=2, seq_len=4)
    np.testing.assert_array_equal(got.tokens, [[1, 5, 6, 0], [1, 7, 0, 8]])
    assert got.documents == 3
    got = data.load([[1, 5, 6], [1, 7], np.array([8, 9, 10])], Bytes(), samples=2, seq_len=4, bos="no")
    np.testing.assert_array_equal(got.tokens, [[5, 6, 0, 7], [0, 8, 9, 10]])
    given = np.arange(12, dtype=np.int64).reshape(4, 3)
    got = data.load(given, samples=1, seq_len=512)
    np.testing.assert_array_equal(got.tokens, given)
    assert got.tokens.dtype == np.int32
    got = data.load(np.arange(7), samples=8, seq_len=3)
    np.testing.assert_array_equal(got.tokens, [[0, 1, 2], [3, 4, 5]])
    assert got.left_tokens == 1


def test_batches_hold_every_sequence_once():
    got = data.load(np.arange(15).reshape(5, 3))
    assert [len(b) for b in got.batches(2)] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(got.batches(2)), got.tokens)
    with pytest.raises(CalibrationError, match="batch_size"):
        got.batches(0)


def test_calibration_set_passes_through_and_is_still_checked():
    one = data.load(np.array([[1, 2, 3]]))
    assert data.load(one, vocab_size=4) is one
    with pytest.raises(CalibrationError, match="token 3"):
        data.load(one, vocab_size=3)


def test_files_txt_jsonl_parquet_npy(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    documents = ["first text", "second text"]
    (tmp_path / "a.txt").write_text("first text")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"id": "x", "text": d}) for d in documents) + "\n\n")
    pq.write_table(pa.table({"n": [1, 2], "text": documents}), tmp_path / "c.parquet")
    np.save(tmp_path / "d.npy", np.array([[1, 2], [3, 4]]))
    assert sources.read_file(tmp_path / "a.txt") == ["first text"]
    assert sources.read_file(tmp_path / "b.jsonl") == [{"id": "x", "text": d} for d in documents]
    assert sources.read_file(tmp_path / "c.parquet") == [{"n": n, "text": d} for n, d in enumerate(documents, 1)]
    np.testing.assert_array_equal(data.load(str(tmp_path / "d.npy")).tokens, [[1, 2], [3, 4]])
    got = data.load(str(tmp_path / "b.jsonl"), Bytes(), samples=1, seq_len=8)
    assert str(tmp_path / "b.jsonl") in got.description


def test_default_text_needs_no_network():
    got = data.load("builtin", Bytes(), samples=64, seq_len=128)
    assert got.tokens.shape == (64, 128)
    assert got.documents > 1


def test_wikitext_lines_become_articles():
    rows = [{"text": t} for t in ["", " = One = \n", "words\n", " = = Part = = \n", "more\n", " = Two = \n", "end\n"]]
    got = list(sources.stream("wikitext", load_dataset=lambda *a, **k: rows))
    assert [t.strip().splitlines()[0].strip() for t in got if t.strip()] == ["= One =", "= Two ="]
    assert "more" in got[0] + got[1]


def test_hub_names_resolve_to_repository_config_and_split():
    asked = []

    def load_dataset(repository, config, **kwargs):
        asked.append((repository, config, kwargs["split"], kwargs["streaming"]))
        return [{"content": "a text"}]

    assert list(sources.stream("hf:me/mine:en:test", load_dataset=load_dataset)) == [{"content": "a text"}]
    assert list(sources.stream("c4", load_dataset=load_dataset)) == [{"content": "a text"}]
    assert asked == [("me/mine", "en", "test", True), ("allenai/c4", "en", "train", True)]


def test_unreachable_hub_names_the_remedy():
    def offline(*_, **__):
        raise ConnectionError("no route to host")

    with pytest.raises(CalibrationError, match=r'no route to host.*calib="builtin"'):
        list(sources.stream("pileval", load_dataset=offline))


def test_missing_datasets_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what `import` sees when it is not installed
    with pytest.raises(CalibrationError, match=r'in its sources; or pass calib="builtin"'):
        list(sources.stream("pileval"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "empty"),
        (["", "  \n"], "no text"),
        ([[]], "empty"),
        (np.zeros((0, 4), np.int32), "empty"),
        (np.array([[0, 300]]), r"token 300 at position \(0, 1\).*0 \.\.\. 257"),
        ([[5, -1]], "token -1"),
        (np.array([[0.5]]), "float64"),
        ([object()], "document 0 is neither"),
        (["text", [1, 2]], "document 0 is neither"),
        (np.zeros((2, 2, 2), np.int32), "document 0 is neither"),
        (7, "empty"),
        ("pilevall", r"unknown calibration source 'pilevall'; known: builtin, pileval, wikitext, c4"),
        ("no/such/file.txt", "does not exist"),
        ("no/such/file.npy", "does not exist"),
        ("a whole text\nof two lines", r"pass \[text\]"),
    ],
)
def test_bad_sources_are_typed_errors(source, message):
    with pytest.raises(CalibrationError, match=message):
        data.load(source, Bytes(), vocab_size=258, samples=2, seq_len=4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"", "no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "row 2 has no text in column 'text' but int"),
        ("a.jsonl", b'{"id": 3}\n', "no column that is known to hold text; it has id$"),
        ("a.jsonl", b"", "no rows"),
        ("a.parquet", b"PAR1 this is not parquet", "not a readable parquet"),
        ("a.npy", b"not numpy", "not a readable .npy"),
    ],
)
def test_bad_files_are_typed_errors(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        data.load(tmp_path / name, Bytes(), samples=2, seq_len=4)
    assert name in str(caught.value)


def test_directory_in_place_of_a_file(tmp_path):
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(CalibrationError, match="cannot read"):
        data.load(Path(tmp_path / "d.txt"), Bytes())


def test_text_without_tokenizer():
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        data.load(["text"])


@pytest.mark.parametrize("bad", [{"samples": 0}, {"seq_len": 0}])
def test_sizes_are_checked(bad):
    with pytest.raises(CalibrationError, match="at least 1"):
        data.load("builtin", Bytes(), **bad)
