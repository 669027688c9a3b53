#!/usr/bin/env bash
# Makes the environment of the packages whose models tests/zoo quantizes, at the versions the tests were passed with.
#
#   tests/zoo/make_envs.sh DIR
#   AWQ_JAX_ZOO_ENVS=DIR pytest -m slow tests/zoo
#
# They need Python 3.12 (PYTHON=...). An environment that is complete is left as it is.
set -euo pipefail

root=${1:?usage: make_envs.sh DIR}
python=${PYTHON:-python3.12}
here=$(cd "$(dirname "$0")/../.." && pwd)
env=$root/flax
mkdir -p "$root"
if [ -e "$env/complete" ]; then
  echo "flax: there already"
  exit
fi
rm -rf "$env"
"$python" -m venv "$env"
"$env/bin/pip" install --quiet jax==0.12.0.1 flax==0.12.12 transformers==4.57.6 keras==3.15.1 keras-hub==0.32.0
# tunix asks for packages of clouds and data pipelines that its models do not import.
"$env/bin/pip" install --quiet --no-deps google-tunix==0.1.7 qwix jaxtyping wadler-lindig einops
"$env/bin/pip" install --quiet -e "$here"
touch "$env/complete"
