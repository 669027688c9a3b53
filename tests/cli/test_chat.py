"""``awq-jax chat`` and files of prompts: what is said is what the library says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import awq_jax
from awq_jax import cli
from awq_jax.cli import chat
from awq_jax.serve.model import Model

FEW = ["--max-new-tokens", "6"]
Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = pytest.importorskip("tiny_checkpoints", reason="makes checkpoints with torch", exc_type=ImportError)
    path = tmp_path_factory.mktemp("chat") / "model"
    tiny.checkpoint(path, num_hidden_layers=1, max_position_embeddings=128)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[Model]:
    """One for the commands too, so that programs are compiled once."""
    loaded = awq_jax.load(checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("awq_jax.serve.model.load", lambda *_, **__: loaded)
        yield loaded


@pytest.fixture
def talk(model: Model, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Exit code, stdout and stderr of a conversation whose lines are piped in."""

    def run(lines: list[str], *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = cli.main(["chat", str(checkpoint), *FEW, *options])
        return code, *capsys.readouterr()

    return run


def said(model: Model, *messages: str, system: str | None = None) -> str:
    """What the model answers to the last of the user's messages, asked in one go."""
    history = [{"role": "system", "content": system}] if system else []
    for message in messages:
        history.append({"role": "user", "content": message})
        [text] = model.generate(history, chat=True, max_new_tokens=6)
        history.append({"role": "assistant", "content": text})
    return text


def test_history_goes_through_the_template(talk: Chat, model: Model) -> None:
    code, out, err = talk(["Hi", "", "ab", "/reset", "ab", "/system Be nice.", "ab", "/system", " /ab", "/exit", "no"])
    assert code == 0, err
    want = [said(model, "Hi"), said(model, "Hi", "ab"), said(model, "ab"), said(model, "ab", system="Be nice."),
            said(model, "/ab")]  # fmt: skip
    assert out == "".join(f"{text}\n" for text in want)
    assert len(set(want)) > 3


def test_answers_as_json_with_the_system_message_of_the_command_line(talk: Chat, model: Model) -> None:
    code, out, err = talk(["ab", "/nope", "/help", "Hi"], "--system", "Be nice.", "--json", "--quiet")
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert first["text"] == said(model, "ab", system="Be nice.")
    assert second["text"] == said(model, "ab", "Hi", system="Be nice.")
    assert (second["prompt"], first["seed"], second["seed"]) == ("Hi", 0, 1)
    assert "no such command: /nope" in err
    assert "/system TEXT" in err


def test_ctrl_c_stops_the_answer_and_not_the_program(talk: Chat, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, pieces = Model.answers, []

    def interrupted(self: Model, *args: Any, stream: Callable[[str], None], **options: Any) -> Any:
        def show(piece: str) -> None:
            stream(piece)
            pieces.append(piece)
            if len(pieces) == 2:
                raise KeyboardInterrupt

        return plain(self, *args, stream=show, **options)

    monkeypatch.setattr(Model, "answers", interrupted)
    code, out, err = talk(["Hi", "ab"])
    monkeypatch.setattr(Model, "answers", plain)
    assert code == 0
    assert "(stopped)" in err
    partly = "".join(pieces[:2])
    history = [("user", "Hi"), ("assistant", partly), ("user", "ab")]
    [text] = model.generate([{"role": r, "content": c} for r, c in history], chat=True, max_new_tokens=6)
    assert out == f"{partly}\n{text}\n"


def test_a_full_context_is_said_and_the_message_forgotten(talk: Chat, model: Model) -> None:
    code, out, err = talk(["x" * 200, "Hi"])
    assert code == 0
    assert "the conversation has 2" in err
    assert "/reset" in err
    assert out == said(model, "Hi") + "\n"


def test_lines_from_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed: list[str | type[BaseException]] = ["Hi", KeyboardInterrupt, "ab", EOFError]

    def type_in(_: str) -> str:
        now = typed.pop(0)
        if isinstance(now, str):
            return now
        raise now

    monkeypatch.setattr("builtins.input", type_in)
    assert list(chat._typed()) == ["Hi", "ab"]
    assert "/exit leaves" in capsys.readouterr().err


def test_files_of_prompts(model: Model, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    texts.write_text("ab\r\n\nHello you\nxyz\n")
    talk = [{"role": "user", "content": "Hi"}]
    rows.write_text(json.dumps({"prompt": "ab"}) + "\n" + json.dumps({"messages": talk, "id": 3}) + "\n")
    options = [*FEW, "--temperature", "1.5", "--seed", "4", "--quiet"]
    found = []
    for size in ("2", "8"):  # a seed for each prompt, so batches change nothing
        assert (
            cli.main(["generate", str(checkpoint), "--prompts", str(texts), "--batch-size", size, "--json", *options])
            == 0
        )
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [{**row, "tokens_per_second": 0} for row in found[0]] == [
        {**row, "tokens_per_second": 0} for row in found[1]
    ]
    for i, (row, prompt) in enumerate(zip(found[0], ["ab", "Hello you", "xyz"], strict=True)):
        [want] = model.answers(prompt, max_new_tokens=6, temperature=1.5, seed=4 + i)
        speed = row.pop("tokens_per_second")
        assert speed["prefill"] > 0
        assert speed["decode"] > 0
        assert row == {
            "model": str(checkpoint), "prompt": prompt, "text": want.text, "finish_reason": want.finish_reason,
            "prompt_tokens": len(prompt), "completion_tokens": want.completion_tokens, "seed": 4 + i,
        }  # fmt: skip
    assert cli.main(["generate", str(checkpoint), "--prompts", str(rows), *FEW, "--quiet"]) == 0
    plain, chatted = model.generate("ab", max_new_tokens=6)[0], said(model, "Hi")
    assert capsys.readouterr().out == f"--- 1: ab\n{plain}\n--- 2: Hi\n{chatted}\n"


def test_log_probabilities_as_json(model: Model, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(checkpoint), "ab", *FEW, "--json", "--logprobs", "2"]) == 0
    got = json.loads(capsys.readouterr().out)
    [want] = model.answers("ab", max_new_tokens=6, logprobs=2)
    assert [t["token"] for t in got["logprobs"]] == list(want.ids)
    assert [len(t["likely"]) for t in got["logprobs"]] == [2] * len(want.ids)
    assert got["seconds"] > 0
