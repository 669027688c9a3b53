# Sourced by the scripts that make environments of other programs: one virtual environment each, under one directory.
#
#   source .../environments.sh
#   make_environments INSTALL "NAME ..." DIR [NAME ...]
#
# INSTALL is a function of the caller's, which is called with each name; all of them, where none is asked for. It puts
# things into the directory $env with `install` (pip's, quietly) and `install_torch`. An environment that is complete is
# left as it is, and one that is not is made anew.

# For the CPU. Its build without CUDA libraries, which PyPI alone would not choose on Linux, is at an index of its own:
# set TORCH_INDEX to nothing where pip's own index gives that build.
torch=torch==2.13.0
torch_index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}

# With uv where there is one, which takes seconds where pip takes minutes; PIP_FIND_LINKS counts for both.
install() {
  if command -v uv > /dev/null; then
    UV_FIND_LINKS=${UV_FIND_LINKS-${PIP_FIND_LINKS-}} uv pip install --quiet --python "$env/bin/python" "$@"
  else
    "$env/bin/pip" install --quiet "$@"
  fi
}

install_torch() {
  install ${torch_index:+--index-url "$torch_index"} "$torch"
}

# Sources of a release, unpacked into $env/source: PROJECT VERSION, as the index spells them.
unpack_sources() {
  "$env/bin/pip" download --quiet --no-deps --no-binary "$1" "$1==$2" -d "$env/source"
  tar -xzf "$env/source/${1//-/_}-$2.tar.gz" -C "$env/source" --strip-components 1
}

make_environments() {
  local maker=$1 every=$2 usage
  usage="usage: $(basename "$0") DIR [${every// /] [}]"
  shift 2
  root=${1:?$usage}
  shift
  [ $# -gt 0 ] || eval "set -- $every"
  mkdir -p "$root"
  root=$(cd "$root" && pwd)
  for name in "$@"; do
    case " $every " in
      *" $name "*) ;;
      *)
        echo "$usage" >&2
        exit 2
        ;;
    esac
    env=$root/$name
    if [ -e "$env/complete" ]; then
      echo "$name: there already"
      continue
    fi
    rm -rf "$env"
    "${python:-python3}" -m venv "$env"
    "$maker" "$name"
    touch "$env/complete"
    echo "$name: made"
  done
}
