"""`awq_jax.progress`: a bar where one is wanted, words of it to a function, and nothing else."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from awq_jax import progress

# As Jupyter's kernel looks to tqdm, without ipywidgets.
NOTEBOOK = """
import sys, types
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
shell = type("ZMQInteractiveShell", (), {})()
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = lambda: shell
sys.modules["ipywidgets"] = None
"""


def run(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=tmp_path, capture_output=True, text=True)


def test_tqdm_is_imported_for_a_bar_that_is_shown_only(tmp_path: Path) -> None:
    code = (
        "import sys, awq_jax; from awq_jax import progress\n"
        "list(progress.through([1], False, 'a', 'b')); print('tqdm' in sys.modules)\n"
        "list(progress.through([1], True, 'a', 'b')); print('tqdm.auto' in sys.modules)"
    )
    assert run(code, tmp_path).stdout == "False\nTrue\n"


def test_a_notebook_without_widgets_gets_text_and_no_remark(tmp_path: Path) -> None:
    code = f"{NOTEBOOK}\nfrom awq_jax import progress\nlist(progress.through(range(3), True, 'work', 'piece'))"
    done = run(code, tmp_path)
    assert done.returncode == 0
    assert "work: 100%" in done.stderr
    assert "3/3" in done.stderr
    assert "IProgress" not in done.stderr
    bare = run(f"{NOTEBOOK}\nfrom tqdm.auto import tqdm", tmp_path)
    assert "IProgress not found" in bare.stderr  # what is kept from users


def test_a_function_is_told_instead(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int | None]] = []
    assert list(progress.through("ab", lambda *now: told.append(now), "work", "piece")) == ["a", "b"]
    assert list(progress.through(iter("a"), lambda *now: told.append(now), "work", "piece")) == ["a"]
    with progress.bar(lambda *now: told.append(now), "work", "piece", 8) as bar:
        bar.update(3)
        bar.update()
    assert told == [(1, 2), (2, 2), (1, None), (3, 8), (4, 8)]
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_stages_are_one_line_on_a_terminal_and_a_few_elsewhere(kind: type[io.StringIO]) -> None:
    out = kind()
    stages = progress.Stages(["reading", "do"], out=out)
    told = stages.next()
    for done in (4, 5, 5, 12):
        told(done, 10)
    stages.next()(1, None)
    stages.end()
    if kind is Terminal:
        shown = ["", "1/2 reading ...", "1/2 reading ... 40%", "1/2 reading ... 50%", "1/2 reading ... 100%"]
        assert out.getvalue().split("\r") == [*shown, "2/2 do ...".ljust(len(shown[-1])), " " * 10, ""]
    else:
        lines = ["1/2 reading ...", "1/2 reading ... 25%", "1/2 reading ... 50%", "1/2 reading ... 100%", "2/2 do ..."]
        assert out.getvalue().splitlines() == lines


def test_stages_that_are_not_shown_say_nothing() -> None:
    out = io.StringIO()
    stages = progress.Stages(["a"], shown=False, out=out)
    stages.next()(1, 2)
    stages.end()
    assert out.getvalue() == ""
