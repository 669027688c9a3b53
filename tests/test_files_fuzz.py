"""Thousands of damaged checkpoints: a typed error or the right weights, and nothing else happens.

`fuzz` describes what a case is; ``python tests/fuzz.py --cases 10000`` runs more of them.
"""

from __future__ import annotations

from pathlib import Path

import fuzz
import numpy as np
import pytest

from awq_jax.convert import registry


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[fuzz.Seed]:
    return fuzz.corpus(tmp_path_factory.mktemp("corpus"))


def judged(tally: fuzz.Tally, cases: int) -> None:
    assert not tally.wrong, "\n".join(tally.wrong[:10])
    assert sum(tally.counts.values()) == cases
    for format in {f for f, _, _ in tally.counts}:  # a reader that refuses or takes everything has not been tested
        assert tally.total("refused", format) > 0, format
        assert tally.total("same", format) > 0, format


def test_every_readable_format_is_in_the_corpus_and_reads_as_the_reference(
    seeds: list[fuzz.Seed], tmp_path: Path
) -> None:
    readable = {f.name for f in registry.FORMATS.values() if f.reader is not None and f.encoder is not None}
    assert {s.format for s in seeds} >= readable | {"gguf"}
    for number, seed in enumerate(seeds):
        fuzz.write(tmp_path / str(number), seed.files)
        path = tmp_path / str(number)
        got = fuzz.read(path / "model.gguf" if seed.format == "gguf" else path)
        assert fuzz.differing(got, seed.truth) == "", (seed.format, seed.variant)
        assert all(np.isfinite(w.astype(np.float64)).all() for w in seed.truth.values())


def test_a_few_hundred_damaged_checkpoints(seeds: list[fuzz.Seed], tmp_path: Path) -> None:
    judged(fuzz.run(tmp_path, seeds, 300), 300)


@pytest.mark.slow
def test_thousands_of_damaged_checkpoints(seeds: list[fuzz.Seed], tmp_path: Path) -> None:
    judged(fuzz.run(tmp_path, seeds, 3000, seed=1), 3000)


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
