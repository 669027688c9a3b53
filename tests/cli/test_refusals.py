"""What cannot be done is refused before weights are read or anything is measured, each command with each option."""

import json
import shutil
from pathlib import Path

import pytest

from awq_jax import cli, evaluate
from awq_jax.bench import timing
from awq_jax.cli import demo_model
from awq_jax.data import sources
from awq_jax.errors import CheckpointError
from awq_jax.serve import model
from awq_jax.stream import job
from awq_jax.stream import run as stream


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = pytest.importorskip("tiny_checkpoints", reason="makes checkpoints with torch", exc_type=ImportError)
    path = tmp_path_factory.mktemp("refusals")
    tiny.checkpoint(path / "model", num_hidden_layers=1)
    tiny.checkpoint(path / "other", num_hidden_layers=1, vocab_size=500)
    packed = model.load(path / "model")
    packed.quantize([[1, 2, 3, 4]], method="rtn", group_size=16, progress=False)
    packed.save(path / "packed")
    shutil.copytree(path / "model", path / "silent")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (path / "silent" / name).unlink(missing_ok=True)
    shutil.copytree(path / "model", path / "strict")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (path / "strict" / "chat_template.jinja").write_text(refusing)
    (path / "empty.txt").write_text("\n \n")
    (path / "latin.txt").write_bytes(b"fine\nna\xefve\n")
    (path / "long.txt").write_text("fine\n" + "x" * 70)
    rows = ['{"prompt": "fine"}', "{", "[1]", '{"text": "x"}', '{"messages": "x"}', '{"prompt": 5}', "7", "null"]
    (path / "prompts.jsonl").write_text("\n".join(rows))
    (path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    (path / "object.json").write_text(json.dumps({"a": 1}))
    return path


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("demo --group-size 100", "group_size must be"),
        ("demo --model model --group-size 96", "does not divide"),
        ("demo --model packed", "quantized already"),
        ("demo --method rtn", "invalid choice"),
        ("eval model --text builtin --against nope", "nope does not exist"),
        ("eval model --text builtin --against other", "same vocabulary"),
        ("eval model --text nope.txt", "does not exist"),
        ("eval model --text nope", "unknown calibration source"),
        ("eval model --text object.json", "a dict of {'a': int}"),
        ("eval model --text builtin --column x", "leave --calib-column x out"),
        ("eval model --text builtin --context 100000", "use --context"),
        ("eval model --text builtin --context 8 --stride 9", "stride must be"),
        ("generate model hi --temperature -1", "temperature must be"),
        ("generate model hi --temperature nan", "temperature must be"),
        ("generate model hi --top-p 0", "top_p must be"),
        ("generate model hi --top-k -1", "top_k must be"),
        ("generate model hi --seed 99999999999999999999", "not a whole number"),
        ("generate model hi --stop=", "a stop string is empty"),
        ("generate silent hi --chat", "no chat template"),
        ("generate model", "pass either PROMPT or --prompts FILE"),
        ("generate model hi --prompts prompts.jsonl", "pass either PROMPT or --prompts FILE"),
        ("generate model hi --min-p 2", "min_p must be"),
        ("generate model hi --presence-penalty 3", "presence_penalty must be"),
        ("generate model hi --logit-bias 5", "not of the form ID:BIAS"),
        ("generate model hi --logit-bias 288:1", "logit_bias names token 288"),
        ("generate model hi --stop-id 288", "stop_ids names token 288"),
        ("generate model hi --logprobs 3", "--logprobs needs --json"),
        ("generate model --prompts nope.txt", "cannot read nope.txt: No such file"),
        ("generate model --prompts empty.txt", "empty.txt has no prompts"),
        ("generate model --prompts latin.txt", "line 2: not UTF-8 text"),
        ("generate model --prompts long.txt", "long.txt: line 2: it has 70 tokens"),
        ("generate model --prompts prompts.jsonl", "line 2: not JSON"),
        ("generate model --prompts prompts.jsonl", 'line 3: not an object with either "prompt" or "messages"'),
        ("generate model --prompts prompts.jsonl", 'line 5: "messages" is not a list'),
        ("generate model --prompts prompts.jsonl", "and 2 more"),
        ("generate silent --prompts chats.jsonl", "line 1: the tokenizer has no chat template"),
        ("chat silent", "silent has no chat template"),
        ("chat silent", "use awq-jax generate"),
        ("chat model --temperature -1", "temperature must be"),
        ("chat strict --system x", "does not take these messages: TemplateError: no system"),
        (f"generate model {'hi' * 900}", "the model's context is"),
        ("quantize model x.gguf", "leave .gguf out; GGUF is made by awq-jax convert"),
        ("quantize model no/../packed", "packed exists"),
        ("quantize model out --resume", "no unfinished run"),
        ("quantize model out --resume --restart", "not allowed with"),
        ("quantize model out --skip nope", "skip 'nope' matches no weight"),
        ("quantize model out --override nope:bits=8", "override 'nope' matches no weight"),
        ("convert packed x.gguf --to gptq", "leave .gguf out"),
        ("convert packed x.safetensors --to gptq", "leave .safetensors out"),
        ("convert packed x --to nope --search y.pt", "format must be one of"),
        ("inspect model --check --plan", "not allowed with"),
        ("bench kernels --group-size 100", "does not divide"),
        ("bench decode --group-size 100", "do not divide"),
        ("bench decode --seconds nan", "must be a positive number"),
        ("bench prefill --context 1000000", "do not fit"),
        ("bench decode --out .", "a directory itself"),
    ],
)
def test_refused_before_work(directory, monkeypatch, capsys, line, told):
    def never(*_, **__):
        raise AssertionError("work began")

    for module, name in ((model, "load"), (stream, "run"), (evaluate, "perplexity"), (timing, "ceilings"),
                         (demo_model, "fetch"), (demo_model, "compare")):  # fmt: skip
        monkeypatch.setattr(module, name, never)
    monkeypatch.chdir(directory)
    before = sorted(directory.iterdir())
    try:
        code = cli.main(line.split(" "))
    except SystemExit as e:
        code = int(e.code or 0)
    assert code == 2
    assert told in capsys.readouterr().err
    assert sorted(directory.iterdir()) == before


def test_calls_are_refused_before_the_text_is_read(directory, monkeypatch):
    monkeypatch.setattr(sources, "default_documents", lambda: pytest.fail("the text was read"))
    options = job.Options()
    for target in ("x.gguf", "packed", "no/../packed"):
        with pytest.raises(CheckpointError):
            job.prepare(directory / "model", directory / target, "builtin", options, {"group_size": 16})
    loaded = model.load(directory / "packed")
    monkeypatch.setattr(loaded, "take_params", lambda: pytest.fail("weights were read"))
    for target in ("x.gguf", "packed"):
        with pytest.raises(CheckpointError):
            loaded.save(directory / target)
