import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import awq_jax
from awq_jax import cli, dtypes
from awq_jax.cli import common
from awq_jax.cli import quantize as quantize_command
from awq_jax.errors import ConfigError, Setting

TEXT = "It is a truth universally acknowledged, that a test must be able to fail.\n" * 40
COMMANDS = re.findall(r"^    (\w+) ", cli.entry.build_parser().format_help(), re.M)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("torch")
    import tiny_checkpoints

    directory = tmp_path_factory.mktemp("cli") / "float"
    # all linears of one shape: compilation is what takes time here
    tiny_checkpoints.checkpoint(directory, num_hidden_layers=1, intermediate_size=32, num_key_value_heads=4)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def packed(checkpoint, text):
    """A packed checkpoint, its report, and what the command printed."""
    dst, report = checkpoint.parent / "packed", checkpoint.parent / "report.html"
    sizes = ["--method", "awq", "--group-size", "16", "--samples", "4", "--seq-len", "32"]
    code, out, err = run("quantize", checkpoint, dst, "--calib", text, "--report", report, *sizes)
    assert code == 0, err
    return dst, report, out, err


def run(*argv):
    """(exit code, stdout, stderr) of a command in this process."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as e:
            code = int(e.code or 0)
    return code, out.getvalue(), err.getvalue()


def test_help_is_fast_and_does_not_import_jax():
    code = (
        "import sys; from awq_jax.cli import build_parser; build_parser().format_help();"
        "print([m for m in ('jax', 'flax', 'numpy', 'transformers') if m in sys.modules])"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    after = os.times()  # processor time, which other programs do not lengthen
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


def test_dtypes_offered_are_those_of_the_library():
    assert tuple(dtypes.FLOATS) == common.FLOATS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"  awq-jax {command}" in out.partition("examples:")[2]
    assert "--json" in out


def test_quantize_prints_a_summary_and_writes_a_report(packed):
    dst, report, out, err = packed
    assert (dst / "config.json").exists()
    assert "7 weights to 4 bits, groups of 16" in out
    assert "bits per weight" in out
    assert "largest remaining errors" in out
    assert "--quantize-head quantizes it" in out  # the remedy as an option, not as a Python argument
    assert f"wrote {dst} (gemm) and {report}" in out
    assert "4 x 32 = 128 tokens" in err
    assert "<svg" in report.read_text()


def test_eval_of_the_packed_model_against_the_float_one(packed, checkpoint, text):
    dst, *_ = packed
    code, out, err = run("eval", dst, "--text", text, "--against", checkpoint, "--context", 16,
                         "--max-tokens", 200, "--json", "--quiet", "--card")  # fmt: skip
    assert code == 0, err
    got = json.loads(out)
    assert f"| perplexity | {got['ppl']:.3f} on 200 tokens of " in (dst / "README.md").read_text()
    assert got["tokens"] == 200
    assert got["windows"] == 13
    assert got["ppl"] == pytest.approx(np.exp(got["nll"]))
    assert got["standard_error"] > 0
    assert 0 < got["against"]["kl"] < 1
    assert err == ""


def test_eval_text_output(checkpoint, text):
    code, out, err = run("eval", checkpoint, "--text", text, "--context", 16, "--max-tokens", 200, "--quiet")
    assert code == 0, err
    assert "perplexity" in out
    assert "200 in 13 windows of 16\n" in out
    argv = ["--text", text, "--context", 16, "--max-tokens", 30, "--quiet", "--json"]
    assert json.loads(run("eval", checkpoint, *argv)[1])["begins_with"] == ""
    assert json.loads(run("eval", checkpoint, *argv, "--bos", "yes")[1])["begins_with"] == "<s>"
    _, out, _ = run("eval", checkpoint, *argv[:-1], "--bos", "yes")
    assert "30 in 2 windows of 16, each begins with <s>" in out


def test_generate_streams_the_same_text_as_json(packed):
    dst, *_ = packed
    code, out, err = run("generate", dst, "Hello", "--max-new-tokens", 8)
    assert code == 0, err
    code, as_json, _ = run("generate", dst, "Hello", "--max-new-tokens", 8, "--json")
    assert json.loads(as_json)["text"] + "\n" == out
    code, chat, err = run("generate", dst, "Hello", "--chat", "--max-new-tokens", 8, "--json")
    assert code == 0, err
    assert json.loads(chat)["text"] != json.loads(as_json)["text"]


def test_inspect_lists_every_tensor_and_what_is_float(packed, checkpoint):
    dst, *_ = packed
    code, out, err = run("inspect", dst, "--json", "--quiet")
    assert code == 0, err
    got = json.loads(out)
    assert got["format"] == "gemm"
    assert (got["bits"], got["group_size"], got["quantized"]) == ([4], [16], 7)
    assert got["float_linears"] == ["lm_head.weight"]
    by_name = {t["name"]: t for t in got["tensors"]}
    assert by_name["model.layers.0.mlp.down_proj.weight"]["shape"] == [32, 32]
    assert by_name["model.norm.weight"]["type"] == "float32"
    assert got["bytes_on_disk"] < json.loads(run("inspect", checkpoint, "--json")[1])["bytes_on_disk"]
    code, table, _ = run("inspect", dst)
    assert code == 0
    assert "lm_head.weight" in table


def test_inspect_plan_prints_scale_groups_as_text_and_as_a_plan(checkpoint):
    from awq_jax.plan.plan import Plan

    code, out, err = run("inspect", checkpoint, "--plan")
    assert code == 0, err
    assert "absorb layers/0/input_layernorm/scale" in out
    plan = Plan.from_dict(json.loads(run("inspect", checkpoint, "--plan", "--json")[1]))
    assert len(list(plan.sites())) == 8


def test_quantize_json_with_overrides_and_a_format_that_holds_them(checkpoint, text, tmp_path):
    code, out, err = run(
        "quantize", checkpoint, tmp_path / "out", "--method", "rtn", "--bits", 3, "--group-size", 16, "--calib", text,
        "--override", "down_proj:bits=8,symmetric=true", "--skip", "o_proj", "--samples", 4, "--seq-len", 32, "--json",
        "--batch-size", 3, "--report", tmp_path / "r.json", "--quiet",
    )  # fmt: skip
    assert code == 0, err
    got = json.loads(out)
    assert got["format"] == "compressed-tensors"
    assert list(got["seconds"]) == ["text", "load", "calibrate", "search", "round", "save"]
    assert got["seconds"]["calibrate"] > got["seconds"]["search"]  # nothing is searched when rounding to nearest
    bits = {r["path"].split("/")[-2]: (r["bits"], r["symmetric"]) for r in got["layers"]}
    assert bits["down_proj"] == (8, True)
    assert bits["q_proj"] == (3, False)
    assert "o_proj" not in bits
    assert "layers/0/self_attn/o_proj/kernel" in got["skipped"]
    assert json.loads((tmp_path / "r.json").read_text())["layers"] == got["layers"]
    inspected = json.loads(run("inspect", tmp_path / "out", "--json")[1])
    assert inspected["bits"] == [3, 8]


def test_the_column_of_rows_is_picked_and_reported(checkpoint, tmp_path):
    rows, sizes = tmp_path / "rows.jsonl", ("--samples", 2, "--seq-len", 16, "--group-size", 16, "--method", "awq")
    rows.write_text("\n".join(json.dumps({"id": "0" * 99, "body": f"Once upon a time {i}. " * 9}) for i in range(9)))
    arguments = ("quantize", checkpoint, tmp_path / "out", "--calib", rows, *sizes)
    code, _, err = run(*arguments)
    assert code == 2
    assert "it has id, body: pick one, such as --calib-column" in err
    code, out, err = run(*arguments, "--calib-column", "body", "--json", "--quiet")
    assert code == 0, err
    said = json.loads(out)["calibration"]
    assert "column 'body': 2 x 16 = 32 tokens" in said
    assert "begins 'Once upon a time" in said
    report = awq_jax.load(checkpoint).quantize(
        rows, column="body", samples=2, seq_len=16, group_size=16, method="awq", progress=False
    )
    assert report.calibration == said
    code, out, err = run("eval", checkpoint, "--text", rows, "--column", "body", "--max-tokens", 40, "--json")
    assert code == 0, err
    assert "column 'body'; begins 'Once" in json.loads(out)["read"]


def test_demo_compares_float_rounded_and_awq_and_answers(checkpoint):
    options = [
        "--method",
        "awq",
        "--group-size",
        "16",
        "--max-new-tokens",
        "8",
        "--samples",
        "2",
        "--eval-tokens",
        "100",
    ]
    code, out, err = run("demo", "--model", checkpoint, *options, "--question", "Hi?", "--json")
    assert code == 0, err
    got = json.loads(out)
    plain, rounded, awq = got["rows"]
    assert [r["name"] for r in got["rows"]] == ["float", "round to nearest", "AWQ"]
    assert plain["delta"] == 0
    assert rounded["delta"] == pytest.approx(rounded["nll"] - plain["nll"])
    assert awq["nll"] != rounded["nll"]
    assert rounded["nbytes"] == awq["nbytes"] < plain["nbytes"]
    assert got["eval_tokens"] == 100
    assert got["answer"]
    assert got["float_answer"]
    assert got["source"] == "float"
    begun = [line.partition(" ...")[0] for line in err.splitlines() if line.endswith(" ...")]
    stages = [
        "fetching and loading the model", "answering with float weights", "scoring float weights",
        "rounding to nearest", "scoring rounded weights", "calibrating and quantizing with AWQ",
        "scoring AWQ's weights", "answering with AWQ's weights",
    ]  # fmt: skip
    assert begun == [f"{i}/8 {stage}" for i, stage in enumerate(stages, 1)]
    assert "6/8 calibrating and quantizing with AWQ ... 100%\n" in err
    assert "served as" not in err
    assert "calibrate:" not in err  # one progress, not a bar for each part


def bad(checkpoint, tmp_path, **replace):
    """A quantize command line with one thing changed."""
    arguments = {"src": checkpoint, "dst": tmp_path / "out", "calib": "builtin", "group_size": 16} | replace
    options = [x for k, v in arguments.items() if k not in ("src", "dst") for x in (f"--{k.replace('_', '-')}", v)]
    return run("quantize", arguments["src"], arguments["dst"], *options)


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"dst": "."}, "exists; choose another directory or pass --overwrite"),
        ({"report": "r.txt"}, "must end in .html or .json"),
        ({"report": "no/such/r.html"}, "cannot write report"),
        ({"bits": 5}, "bits must be one of"),
        ({"group_size": 20}, "group_size must be"),
        ({"method": "magic"}, "method must be one of"),
        ({"skip": "("}, "bad regular expression"),
        ({"override": "down_proj=8"}, "not of the form"),
        ({"override": "down_proj:colour=8"}, "colour"),
        ({"bits": 3, "format": "gemm"}, "format gemm holds 4-bit"),
        ({"format": "magic"}, "format must be one of"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"calib": "nonsense"}, "unknown calibration source"),
        ({"calib_column": "text"}, "has no columns"),
        ({"calib": "no/such.txt"}, "no/such.txt does not exist"),
        ({"src": "no/such/model"}, "no/such/model"),
        ({"group_size": 64}, "layers/0/mlp/down_proj/kernel: 32 rows"),
        ({"group_size": 64}, "--on-indivisible float"),
    ],
)
def test_bad_input_is_one_typed_line_before_any_work(checkpoint, tmp_path, replace, message):
    code, out, err = bad(checkpoint, tmp_path, **replace)
    assert code == 2
    assert err.startswith("awq-jax: error: ")
    assert message in err
    assert "Traceback" not in err
    assert "calibrate" not in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_overwriting_what_is_no_checkpoint_is_refused_before_any_work(checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    arguments = ("--calib", "builtin", "--group-size", 16, "--overwrite")
    code, _, err = run("quantize", checkpoint, tmp_path, *arguments)
    assert code == 2
    assert "is not a checkpoint directory" in err
    assert "calibrate" not in err
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_a_format_that_turns_out_too_small_does_not_lose_the_work(checkpoint, tmp_path):
    source, out = tmp_path / "src", tmp_path / "out"
    shutil.copytree(checkpoint, source)
    weights = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name] * np.float32(1e8)  # its scales do not fit into float16
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    arguments = ("--calib", "builtin", "--samples", 1, "--seq-len", 16, "--group-size", 16, "--method", "rtn")
    code, _, err = run("quantize", source, out, *arguments, "--format", "gemm")
    assert code == 2
    assert name in err
    assert "Nothing is lost" in err
    assert awq_jax.load(out).source.format == "awq-jax"


def test_the_source_is_not_overwritten_by_the_result(checkpoint):
    before = {f.name: f.read_bytes() for f in checkpoint.iterdir()}
    arguments = ("--calib", "builtin", "--group-size", 16, "--overwrite")
    code, _, err = run("quantize", checkpoint, checkpoint, *arguments)
    assert code == 2
    assert "is the source" in err
    assert {f.name: f.read_bytes() for f in checkpoint.iterdir()} == before


def test_unknown_architecture_is_refused(tmp_path, checkpoint):
    source = tmp_path / "src"
    source.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "mamba9"}))
    code, _, err = bad(source, tmp_path)
    assert code == 2
    assert "'mamba9' is not supported" in err


def test_packed_source_is_refused(packed, tmp_path):
    code, _, err = bad(packed[0], tmp_path)
    assert code == 2
    assert "quantized already" in err


def test_debug_shows_the_traceback(checkpoint, tmp_path):
    with pytest.raises(ConfigError):
        cli.main(["quantize", str(checkpoint), str(tmp_path / "x"), "--bits", "5", "--debug"])


@pytest.mark.parametrize(
    "argv", [[], ["fly"], ["quantize"], ["eval", "x"], ["eval", "x", "--text", "t", "--context", "0"]]
)
def test_wrong_usage_exits_2(argv):
    code, _, err = run(*argv)
    assert code == 2
    assert "usage" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("down_proj:bits=8", ("down_proj", {"bits": 8})),
        ("layers/(0|1)/:group_size=-1, symmetric=True", ("layers/(0|1)/", {"group_size": -1, "symmetric": True})),
        ("(?:q|k)_proj:bits=3,group_size=32", ("(?:q|k)_proj", {"bits": 3, "group_size": 32})),
    ],
)
def test_overrides_are_parsed(text, expected):
    assert quantize_command.parse_override(text) == expected


@pytest.mark.parametrize("text", ["x", "x:", ":bits=8", "x:bits", "x:bits=many", "x:symmetric=1", "x:bits=true"])
def test_malformed_overrides_are_refused(text):
    with pytest.raises(ConfigError, match="not of the form"):
        quantize_command.parse_override(text)


def test_json_is_strict():
    assert json.loads(common.to_json({"a": float("nan"), "b": [float("inf"), (1.5,)]})) == {
        "a": None,
        "b": [None, [1.5]],
    }


def test_plan_needs_no_weights():
    from awq_jax import models
    from awq_jax.stream import decoder_blocks

    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 1}
    config = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096} | sizes
    plan = decoder_blocks.Chain(models.config_from_hf(config | {"rms_norm_eps": 1e-5})).plan()
    assert "layers/0/self_attn/q_proj/kernel" in {site.path for _, site in plan.sites()}


def test_convert(packed, tmp_path):
    code, out, err = run("convert", packed[0], tmp_path / "float", "--to", "float", "--dtype", "bfloat16", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["target_format"] == "float"
    assert found["exact"] is False
    assert {t["dtype"] for t in found["tensors"]} == {"bfloat16"}
    code, out, err = run(
        "convert", packed[0], tmp_path / "own", "--to", "awq-jax", "--max-shard-size", "20KB", "--quiet"
    )
    assert code == 0, err
    assert "exactly those of the source" in out
    assert len(list((tmp_path / "own").glob("*.safetensors"))) > 1
    code, out, _ = run("convert", "--list")
    assert code == 0
    assert "gemm" in out
    assert set(json.loads(run("convert", "--list", "--json")[1])["conversions"]) >= {"gemm", "awq-jax"}


def test_convert_refuses(packed, tmp_path):
    assert "--list" in run("convert", packed[0])[2]
    assert "must be one of" in run("convert", packed[0], tmp_path / "x", "--to", "nothing")[2]
    assert run("convert", packed[0], tmp_path / "x", "--to", "float", "--max-shard-size", "many")[0] == 2
    assert not (tmp_path / "x").exists()


def test_sizes():
    from awq_jax.cli.convert import size

    assert [size(t) for t in ("10", "2k", "500MB", "1.5GiB", "3 KiB")] == [10, 2000, 500_000_000, 3 << 29, 3072]


def test_remedies_are_spelled_for_whoever_reads_them():
    settings = (Setting("group_size", -1), Setting("on_indivisible", "pad"), Setting("quantize_head", True))
    error = ConfigError(f"pass {settings[0]}, {settings[1]} or {settings[2]}", *settings)
    assert str(error) == 'pass group_size=-1, on_indivisible="pad" or quantize_head=True'
    assert common.error(error) == "awq-jax: error: pass --group-size -1, --on-indivisible pad or --quantize-head"
    assert common.error(OSError("disk full")) == "awq-jax: error: disk full"
    assert pickle.loads(pickle.dumps(error)).settings == settings
