#!/usr/bin/env bash
# gguf 0.19.0 (with numpy 2.4.6): GGUFWriter on a device without space.
# One would guess: writing tensors raises OSError (No space left on device), whatever their size.
# Seen: write_tensor_data of a norm of 576 float32 values returns as if written, because ndarray.tofile leaves up to
# 4 KiB to the buffer of a C file whose closing is not checked; a tensor of 1 MiB raises. /dev/full stands for the disk.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
cat > "$dir/seen.py" <<'PY'
from importlib.metadata import version
import numpy as np
import gguf

print("gguf", version("gguf"), "numpy", version("numpy"))
seen = []
for n in (576, 1 << 18):
    writer = gguf.GGUFWriter(None, "llama")
    tensor = np.ones(n, np.float32)
    writer.add_tensor_info("output_norm.weight", tensor.shape, tensor.dtype, tensor.nbytes)
    with open("/dev/full", "wb", buffering=0) as disk:
        writer.fout = [disk]
        writer.state = gguf.gguf_writer.WriterState.TI_DATA
        try:
            writer.write_tensor_data(tensor)
            seen.append("no error")
        except OSError as e:
            seen.append(type(e).__name__)
    print(f"{tensor.nbytes} bytes: {seen[-1]}")
assert seen == ["no error", "OSError"], seen
PY
"$dir/venv/bin/python" "$dir/seen.py"
