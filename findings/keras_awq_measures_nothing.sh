#!/usr/bin/env bash
# Keras 3.15.1: model.quantize("awq", config) with a calibration set.
# One would guess: the scales of the channels follow the activations, as AWQ has it.
# Seen: the hook that is to measure the inputs of a layer stands in place of `call`, but a layer that is to be quantized is
# called through `quantized_call`: every magnitude is zero, every scale 1, and nothing warns that this rounds to nearest.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check keras==3.15.1 jax==0.10.2
cat > "$dir/seen.py" <<'PY'
import os

os.environ["KERAS_BACKEND"] = "jax"
import keras
import numpy as np

rng = np.random.default_rng(0)
embedding = keras.layers.Embedding(64, 128)
embedding.build((None, None))
embedding.set_weights([rng.normal(size=(64, 128)) * np.exp(rng.normal(size=128))])
block = keras.Sequential([keras.Input((None, 128)), keras.layers.Dense(128, use_bias=False)])
ids = rng.integers(0, 64, (8, 16))
model = keras.Sequential([embedding, block])
model(ids)
measured = []
update = keras.src.quantizers.awq.AWQ.update_activation_magnitudes
keras.src.quantizers.awq.AWQ.update_activation_magnitudes = lambda self, x: (measured.append(x.shape), update(self, x))
config = keras.quantizers.AWQConfig(
    dataset=list(ids), tokenizer=lambda x: x, num_samples=8, sequence_length=16, group_size=128,
    quantization_layer_structure={"pre_block_layers": [embedding], "sequential_blocks": [block]},
)
model.quantize("awq", config=config)
scales = np.asarray(block.layers[-1].awq_scales)
print("keras", keras.__version__, "batches measured:", len(measured), "scales:", scales.min(), "to", scales.max())
assert not measured
assert (scales == 1).all()
PY
"$dir/venv/bin/python" "$dir/seen.py"
