#!/usr/bin/env bash
# Makes the environments of the packages whose models tests/zoo quantizes, at the versions the tests were passed with.
#
#   tests/zoo/make_envs.sh DIR [flax] [maxtext] [more]
#   AWQ_JAX_ZOO_ENVS=DIR pytest -m slow tests/zoo
#
# They need Python 3.12 (PYTHON=...). An environment that is complete is left as it is.
set -euo pipefail
python=${PYTHON:-python3.12}
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=../helpers/environments.sh
source "$here/../helpers/environments.sh"

install_models() {
  install jax==0.12.0.1 flax==0.12.12 numpy==2.5.5
  case $1 in
    flax)
      install transformers==4.57.6 keras==3.15.1 keras-hub==0.32.0 pillow==13.0.0
      # Of what tunix asks for, what importing it needs: no clouds, no data pipelines.
      install google-metrax==0.2.4 clu==0.0.12 perfetto==0.59.1 pandas==3.1.1 flatbuffers==25.12.19
      install --no-deps google-tunix==0.1.7 qwix==0.1.8 jaxtyping==0.3.11 wadler-lindig==0.1.8 einops==0.8.2
      install --no-deps recurrentgemma==1.0.1 typeguard==2.13.3 # whose annotations a later typeguard does not read
      unpack_sources flax 0.12.12  # Flax's own examples are in its sources, not in its wheel
      ;;
    maxtext)
      # What its models, configs and checkpoints import, of all that it asks for: no clouds, no data pipelines.
      install omegaconf==2.4.0 pydantic==2.14.4 transformers==5.24.0 sentencepiece==0.2.3 tiktoken==0.14.0 \
        optax==0.2.8 orbax-checkpoint==0.12.8 psutil==7.2.2 requests==2.34.2 jsonlines==4.0.0 pandas==3.1.1 \
        sympy==1.14.0 pillow==13.0.0 grain==0.2.18 immutabledict==4.3.1 fastapi==0.165.0 uvicorn==0.54.0 \
        jinja2==3.1.6 xprof==2.24.2 einshape==1.0 jaxtyping==0.3.11
      install --no-deps maxtext==0.2.5 tokamax==0.0.17 qwix==0.1.8 aqtp==0.9.0 pathwaysutils==0.1.13 drjax==0.2.1 \
        wadler-lindig==0.1.8
      ;;
    more)
      install einops==0.8.2 einshape==1.0 optax==0.2.8 jaxtyping==0.3.11 wadler-lindig==0.1.8 huggingface-hub==2.4.0 \
        orbax-checkpoint==0.12.8 typeguard==4.6.1 "etils[enp,epath,epy]==1.15.0" sentencepiece==0.2.3 protobuf==7.36.2 \
        dialog==1.1.0 mediapy==1.2.7 immutabledict==4.3.1 clu==0.0.12 tensorflow==2.21.0 chex==0.1.92
      install --no-deps mamba2-jax==1.1.2 nano-moe-jax==0.1.0 vidax==0.1.0 timesfm==3.0.2 gemma==4.0.1 kauldron==1.4.4
      ;;
  esac
  install -e "$here/../.."
}

make_environments install_models "flax maxtext more" "$@"
