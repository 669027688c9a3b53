"""lm-eval's own Hugging Face model on the same float checkpoint is the oracle; tasks are local files, no network.

Slow, and only where lm-eval is installed, which is not in the ``test`` extra: with 35 further packages of 235 MB (NLTK,
scikit-learn, sacrebleu, ...) it is larger than all that the other tests of text need. ``HFLM`` needs accelerate, too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval.api")  # ``lm_eval`` alone may be this folder
tiny = pytest.importorskip("tiny_checkpoints", reason="makes checkpoints with torch", exc_type=ImportError)
# Here, where lm-eval is installed: other tests of this process talk to a stand-in of the hub.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from awq_jax.errors import ConfigError  # noqa: E402
from awq_jax.lm_eval import command  # noqa: E402
from awq_jax.lm_eval.lm import AwqJaxLM  # noqa: E402

pytestmark = pytest.mark.slow
WORDS = "The cat sat on the mat and then it looked at the dog, who slept. "
PAIRS = [
    ("The cat", " sat on"),
    ("The cat ", "sat"),  # the space goes to the continuation
    ("", "Once"),
    ("x", "yz" * 20),
    (WORDS * 4, " The end"),  # cut on the left
    ("<s>begins", " itself"),
    *((WORDS[:n], WORDS[n : n + 3]) for n in range(3, 20)),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm_eval") / "model"
    tiny.checkpoint(path, num_hidden_layers=1, max_position_embeddings=96)
    return path


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> HFLM:
    # With its cache, lm-eval 0.4.13 scores " on" after "The cat sat" as the first letters of " sat on" after "The cat".
    return HFLM(pretrained=str(checkpoint), device="cpu", batch_size=4, dtype="float32", logits_cache=False)


@pytest.fixture(scope="module", params=[4, "auto"])
def ours(checkpoint: Path, request: pytest.FixtureRequest) -> AwqJaxLM:
    return AwqJaxLM(pretrained=str(checkpoint), batch_size=request.param)


def requests(kind: str, rows: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=row, idx=i) for i, row in enumerate(rows)]


def test_loglikelihoods(ours: AwqJaxLM, theirs: HFLM) -> None:
    greedy = theirs.generate_until(requests("generate_until", [("The cat", {"until": [], "max_gen_toks": 3})]))[0]
    rows = [*PAIRS, ("The cat", greedy)] if greedy.isascii() and greedy else PAIRS
    got = ours.loglikelihood(requests("loglikelihood", rows), disable_tqdm=True)
    want = theirs.loglikelihood(requests("loglikelihood", rows), disable_tqdm=True)
    assert [v for v, _ in got] == pytest.approx([v for v, _ in want], abs=1e-4, rel=1e-5)
    assert [g for _, g in got] == [g for _, g in want]
    assert ours.scorer.score._cache_size() <= 6


def test_greedy_is_true_where_it_is(ours: AwqJaxLM) -> None:
    ids = ours.tok_encode("The cat")
    [answer] = ours.model.answers([ids], max_new_tokens=5, stop_ids=[])
    good, bad = list(answer.ids), [*answer.ids[:-1], (answer.ids[-1] + 1) % 200]
    scored = ours._loglikelihood_tokens([(None, ids, good), (None, ids, bad)], disable_tqdm=True)
    assert [g for _, g in scored] == [True, False]


def test_rolling(ours: AwqJaxLM, theirs: HFLM) -> None:
    rows = [(WORDS,), (WORDS * 5,), ("a",)]
    got = ours.loglikelihood_rolling(requests("loglikelihood_rolling", rows), disable_tqdm=True)
    want = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", rows), disable_tqdm=True)
    assert got == pytest.approx(want, abs=1e-4, rel=1e-6)


def test_generation(ours: AwqJaxLM, theirs: HFLM) -> None:
    settings = {"until": ["\x00never", "a"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    rows = [(text, settings) for text in ("The cat", "x", WORDS, WORDS * 3, "<s>hi", "q", "dog")]
    rows += [("The cat", {"until": "</s>", "max_new_tokens": 4})]
    got = ours.generate_until(requests("generate_until", rows), disable_tqdm=True)
    # One at a time: HFLM pads on the left and cuts what is padded.
    want = [theirs.generate_until([r], disable_tqdm=True)[0] for r in requests("generate_until", rows)]
    assert got == want
    assert any(got)
    drawn = [("x", {"temperature": 2.0, "max_gen_toks": 12})] * 3  # repeats, as for pass@k
    assert len(set(ours.generate_until(requests("generate_until", drawn), disable_tqdm=True))) == 3


def test_chat_template(ours: AwqJaxLM, theirs: HFLM) -> None:
    talk = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(talk) == theirs.apply_chat_template(talk)
    left_open = [*talk, {"role": "assistant", "content": "Well,"}]
    assert ours.apply_chat_template(left_open, False) == theirs.apply_chat_template(left_open, False)
    assert ours.chat_template(True) == theirs.chat_template(True)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    before, ours.tokenizer.chat_template = ours.tokenizer.chat_template, refusing
    assert ours.apply_chat_template(talk) == "Hi"
    ours.tokenizer.chat_template = before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colour": 1}, "colour"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": "many"}, "batch_size must be"),
        ({"max_length": 97}, "max_length 97 is more than the model's 96"),
        ({"pretrained": ""}, "pretrained=DIR"),
    ],
)
def test_bad_arguments(checkpoint: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AwqJaxLM(**{"pretrained": str(checkpoint)} | arguments)


TASK = """
task: local_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
"""


def test_the_command_line_runs_tasks_from_local_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiple choice, perplexity of texts and generation, with the template of the model; as the ``hf`` model."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"Is {i} even?", "answer": i % 2, "choices": [" yes", " no"], "text": WORDS} for i in range(6)]
    data.write_text("\n".join(map(json.dumps, rows)))
    kinds = {
        "multiple_choice": 'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\n',
        "loglikelihood_rolling": 'doc_to_target: "{{text}}"\nmetric_list: [{metric: word_perplexity}]\n',
        "generate_until": 'doc_to_target: "{{answer}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 8}\n'
        "metric_list: [{metric: exact_match}]\n",
    }
    for kind, more in kinds.items():
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(kind=kind, data=data) + more)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = {}
    for name in ("awq-jax", "hf"):
        out = tmp_path / name
        line = [
            "--model",
            name,
            "--model_args",
            f"pretrained={checkpoint},dtype=float32",
            "--include_path",
            str(tmp_path),
        ]
        line += ["--tasks", ",".join(f"local_{k}" for k in kinds), "--output_path", str(out), "--batch_size", "2"]
        line += ["--apply_chat_template", "--system_instruction", "Be brief.", "--log_samples", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["lm_eval", *line])
        assert command.main() == 0
        [results] = out.rglob("results_*.json")
        found[name] = json.loads(results.read_text())["results"]
        samples = sorted(out.rglob("samples_*.jsonl"))
        assert len(samples) == 3
        said = [json.loads(line)["resps"] for line in samples[0].read_text().splitlines()]
        found[f"{name}-said"] = said
    assert found["awq-jax-said"] == found["hf-said"]
    for task, mine in found["awq-jax"].items():
        for metric, value in mine.items():
            if isinstance(value, float):
                assert value == pytest.approx(found["hf"][task][metric], rel=1e-4), (task, metric)
    assert found["awq-jax"]["local_loglikelihood_rolling"]["word_perplexity,none"] > 1
