#!/usr/bin/env bash
# torch 2.13.0: _convert_weight_to_int4pack_for_cpu, with which GPTQModel makes the words of AWQ and GPTQ linears anew at
# the first forward pass on a CPU; transformers then saves the model so, still called version "gemm" or format "gptq".
# One would guess: a qweight in a file means one thing.
# Seen: the same codes are other bytes with AVX-512 than without, and nothing in the file says which. (Needs a processor
# that has it.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/seen.py" <<'PY'
import torch

codes = torch.arange(64 * 64, dtype=torch.int32).reshape(64, 64) % 16
packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
print(torch.backends.cpu.get_cpu_capability(), packed.dtype, tuple(packed.shape), packed.numpy().tobytes().hex())
PY
for capability in avx2 avx512; do
  ATEN_CPU_CAPABILITY=$capability "$dir/venv/bin/python" "$dir/seen.py" > "$dir/$capability"
  cut -c 1-80 "$dir/$capability"
done
grep -q "^AVX512 torch.uint8 (64, 32)" "$dir/avx512"
grep -q "^AVX2 torch.uint8 (64, 32)" "$dir/avx2"
if [ "$(awk '{print $NF}' "$dir/avx2")" = "$(awk '{print $NF}' "$dir/avx512")" ]; then exit 1; fi
