#!/usr/bin/env bash
# Makes the environments of the packages whose models tests/zoo quantizes, at the versions the tests were passed with.
#
#   tests/zoo/make_envs.sh DIR [flax] [maxtext]
#   AWQ_JAX_ZOO_ENVS=DIR pytest -m slow tests/zoo
#
# They need Python 3.12 (PYTHON=...). An environment that is complete is left as it is.
set -euo pipefail

usage="usage: make_envs.sh DIR [flax] [maxtext]"
root=${1:?$usage}
shift
wanted=("$@")
[ ${#wanted[@]} -gt 0 ] || wanted=(flax maxtext)
python=${PYTHON:-python3.12}
here=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$root"
for name in "${wanted[@]}"; do
  env=$root/$name
  if [ -e "$env/complete" ]; then
    echo "$name: there already"
    continue
  fi
  rm -rf "$env"
  "$python" -m venv "$env"
  pip=("$env/bin/pip" install --quiet)
  "${pip[@]}" jax==0.12.0.1 flax==0.12.12 numpy==2.5.5
  case $name in
    flax)
      "${pip[@]}" transformers==4.57.6 keras==3.15.1 keras-hub==0.32.0 pillow==13.0.0
      # tunix asks for packages of clouds and data pipelines that its models do not import.
      "${pip[@]}" --no-deps google-tunix==0.1.7 qwix==0.1.8 jaxtyping==0.3.11 wadler-lindig==0.1.8 einops==0.8.2
      # Flax's own examples are in its sources, not in its wheel.
      "$env/bin/pip" download --quiet --no-deps --no-binary flax flax==0.12.12 -d "$env/source"
      tar -xzf "$env/source/flax-0.12.12.tar.gz" -C "$env/source" --strip-components 1
      ;;
    maxtext)
      # What its models, configs and checkpoints import, of all that it asks for: no clouds, no data pipelines.
      "${pip[@]}" omegaconf==2.4.0 pydantic==2.14.4 transformers==5.24.0 sentencepiece==0.2.3 tiktoken==0.14.0 \
        optax==0.2.8 orbax-checkpoint==0.12.8 psutil==7.2.2 requests==2.34.2 jsonlines==4.0.0 pandas==3.1.1 \
        sympy==1.14.0 pillow==13.0.0 grain==0.2.18 immutabledict==4.3.1 fastapi==0.165.0 uvicorn==0.54.0 \
        jinja2==3.1.6 xprof==2.24.2 einshape==1.0 jaxtyping==0.3.11
      "${pip[@]}" --no-deps maxtext==0.2.5 tokamax==0.0.17 qwix==0.1.8 aqtp==0.9.0 pathwaysutils==0.1.13 drjax==0.2.1 \
        wadler-lindig==0.1.8
      ;;
    *)
      echo "$usage" >&2
      exit 2
      ;;
  esac
  "${pip[@]}" -e "$here"
  touch "$env/complete"
  echo "$name: made"
done
