"""Without the extra ``hf`` the three lines work, and what needs it stops with the command that installs it."""

import subprocess
import sys

BLOCKED = "transformers gguf huggingface_hub filelock datasets torch"
PROGRAM = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Absent())
import jax, jax.numpy as jnp, numpy as np, pathlib, tempfile
import awq_jax
from awq_jax.cli import main

model = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["head"]
p = {{"up": np.ones((32, 8), np.float32), "head": np.ones((8, 4), np.float32)}}
x = np.ones((2, 32), np.float32)
q = awq_jax.quantize(p, awq_jax.calibrate(model, p, [x], progress=False), method="rtn", group_size=32, progress=False)
assert np.allclose(awq_jax.bind(model)(q, x), model(p, x), rtol=1e-2)

folder = pathlib.Path(tempfile.mkdtemp())
(folder / "a.gguf").write_bytes(b"GGUF")
for command in (["inspect", str(folder / "a.gguf")], ["quantize", "someone/model", str(folder / "out")], ["demo"]):
    print(main(command), file=sys.stderr)
"""


def test_without_the_extra() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    told = [line for line in run.stderr.splitlines() if line.startswith("awq-jax: error")]
    assert run.stderr.splitlines().count("2") == len(told) == 3, run.stderr[-3000:]
    assert all('pip install "awq-jax[hf]"' in line for line in told), told
