"""Thousands of damaged checkpoints: a typed error or the right weights, and nothing else happens.

`fuzz` describes what a case is; ``python tests/convert/fuzz/fuzz.py --cases 10000`` runs more of them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import fuzz
import fuzz_mutations
import numpy as np
import pytest

from awq_jax.convert import conversion, registry
from awq_jax.convert.files.safetensors import MAX_HEADER
from awq_jax.convert.writing import write_checkpoint
from awq_jax.errors import AwqError, CheckpointError, FormatError


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[fuzz.Seed]:
    return fuzz.corpus(tmp_path_factory.mktemp("corpus"))


def judged(tally: fuzz.Tally, cases: int) -> None:
    assert not tally.wrong, "\n".join(tally.wrong[:10])
    assert sum(tally.counts.values()) == cases
    # a reader that refuses or takes everything has not been tested
    assert tally.total("refused") > cases / 3
    assert tally.total("same") > cases / 20
    assert tally.total("changed") > cases / 50


def test_every_format_is_in_the_corpus_and_reads_as_the_reference(seeds: list[fuzz.Seed], tmp_path: Path) -> None:
    written = {f.name for f in registry.FORMATS.values() if f.encoder is not None}
    assert {s.format for s in seeds} == written | {"gguf"}
    for number, seed in enumerate(seeds):
        fuzz.write(tmp_path / str(number), seed.files)
        got = fuzz.read(fuzz.opens(tmp_path / str(number), seed.files))
        assert fuzz.differing(got, seed.truth) == "", (seed.format, seed.variant)
        assert all(np.isfinite(w.astype(np.float64)).all() for w in seed.truth.values())


def test_a_hundred_damaged_checkpoints(seeds: list[fuzz.Seed], tmp_path: Path) -> None:
    judged(fuzz.run(tmp_path, seeds, 100), 100)


@pytest.mark.slow
def test_thousands_of_damaged_checkpoints(seeds: list[fuzz.Seed], tmp_path: Path) -> None:
    tally = fuzz.run(tmp_path, seeds, 3000, seed=1)
    judged(tally, 3000)
    for seed in seeds:
        assert tally.total("refused", seed.format) > 0, seed.format
        assert tally.total("same", seed.format) > 0, seed.format


def modelled(seeds: list[fuzz.Seed], tmp_path: Path, cases: int) -> None:
    fuzzer = fuzz.Fuzzer(tmp_path, seeds)
    results = [fuzzer.model(number) for number in range(cases)]
    assert not [(n, r) for n, r in enumerate(results) if r.wrong]
    assert {r.outcome for r in results} == {"same", "refused"}


def test_a_config_that_describes_another_model(seeds: list[fuzz.Seed], tmp_path: Path) -> None:
    modelled(seeds, tmp_path, 30)


@pytest.mark.slow
def test_many_configs_that_describe_another_model(seeds: list[fuzz.Seed], tmp_path: Path) -> None:
    modelled(seeds, tmp_path, 600)


def test_the_fuzzer_notices_wrong_weights_and_foreign_files(seeds: list[fuzz.Seed], tmp_path: Path) -> None:
    seed = next(s for s in seeds if s.format == "float")
    path = tmp_path / "checkpoint"
    fuzz.write(path, seed.files)
    right = fuzz.read(path)
    name = "model.norm.weight"
    assert fuzz.differing(right | {name: right[name] * np.float16(1.001)}, seed.truth).startswith(name)
    assert fuzz.differing({k: v for k, v in right.items() if k != name}, seed.truth).startswith("names")
    watch = fuzz.Watch(tmp_path)
    with watch():
        (tmp_path / "elsewhere").write_text("x")
        (tmp_path / "elsewhere").unlink()
    assert [f.split()[0] for f in watch.found] == ["write", "os.remove"]


def refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        fuzz.read(directory)


def test_what_it_has_found(seeds: list[fuzz.Seed], tmp_path: Path) -> None:
    """Each of these was accepted, or ended in another exception, once."""
    files = next(s.files for s in seeds if s.format == "gemm" and "model.safetensors" in s.files)
    header, data = fuzz_mutations.opened(files["model.safetensors"])
    name = "model.norm.weight"

    def damaged(number: int, **changes: bytes) -> Path:
        directory = tmp_path / str(number)
        fuzz.write(directory, files | {k.replace("__", "."): v for k, v in changes.items()})
        return directory

    # names and metadata that are no text: printing or writing them would raise UnicodeEncodeError
    renamed = {("\ud800" if n == name else n): i for n, i in header.items()}
    refused(damaged(0, model__safetensors=fuzz_mutations.closed(renamed, data)), "half of a surrogate")
    noted = header | {"__metadata__": {"a": "\ud800"}}
    refused(damaged(1, model__safetensors=fuzz_mutations.closed(noted, data)), "strings to strings")
    # parts of a packed module without the codes: read as float tensors
    stray = {(n.replace("q_proj.qweight", "q_proj.qweights")): i for n, i in header.items()}
    refused(damaged(2, model__safetensors=fuzz_mutations.closed(stray, data)), "belongs to no packed module")
    # links out of the checkpoint: converting it would publish what they lead to
    (tmp_path / "secret").write_text('{"password": 1}')
    for number, file in enumerate(("config.json", "generation_config.json", "tokenizer.json"), 3):
        directory = damaged(number)
        (directory / file).unlink(missing_ok=True)
        (directory / file).symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match="outside the checkpoint"):
            conversion.checkpoint(directory, tmp_path / "out", "awq-jax")
    # a JSON file that would fill the memory
    directory = damaged(6)
    with (directory / "config.json").open("r+b") as f:
        f.truncate(MAX_HEADER + 1)
    refused(directory, "too many for a JSON file")
    assert not (tmp_path / "out").exists()


def test_a_packed_weight_that_overflows_as_float_is_refused(tmp_path: Path) -> None:
    """It was written as inf."""
    weights = fuzz.weights(bits=4)
    q = weights["model.layers.0.mlp.up_proj.weight"]
    large = dataclasses.replace(q, scales=np.full(q.scales.shape, 1e38, np.float32))
    write_checkpoint(tmp_path / "a", [("x.weight", large)], {}, "awq-jax")
    with pytest.raises(FormatError, match=r"x\.weight is too large for float32"):
        conversion.checkpoint(tmp_path / "a", tmp_path / "b", "float")
    assert not (tmp_path / "b").exists()


def test_gguf_names_are_bounded(seeds: list[fuzz.Seed], tmp_path: Path) -> None:
    """A header that claims a name of kilobytes: it was repeated in the message."""
    data = bytearray(next(s.files for s in seeds if s.format == "gguf")["model.gguf"])
    at = data.index(b"blk.0.attn_k.weight") - 8
    data[at : at + 8] = (3000).to_bytes(8, "little")
    (tmp_path / "model.gguf").write_bytes(bytes(data))
    with pytest.raises(AwqError, match=r"name has \d+ characters") as e:
        fuzz.read(tmp_path / "model.gguf")
    assert len(str(e.value)) < 300
