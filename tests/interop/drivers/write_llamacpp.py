"""Convert a float checkpoint with llama.cpp's converter and quantize it with llama.cpp.

    python write_llamacpp.py SRC DST.gguf TYPE CONVERTER

TYPE is F32, Q4_0, Q4_1 or Q8_0; CONVERTER is llama.cpp's convert_hf_to_gguf.py.
"""

import subprocess
import sys
from pathlib import Path

import llama_cpp

TYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def main(src: str, dst: str, kind: str, converter: str) -> None:
    whole = dst if kind == "F32" else str(Path(dst).with_suffix(".f32.gguf"))
    subprocess.run([sys.executable, converter, src, "--outfile", whole, "--outtype", "f32"], check=True)
    if kind == "F32":
        return
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = TYPES[kind]
    settings.nthread = 1
    settings.pure = True  # every matrix of the one type, the embedding too
    if llama_cpp.llama_model_quantize(whole.encode(), dst.encode(), settings):
        raise SystemExit(f"llama.cpp could not quantize {whole}")


if __name__ == "__main__":
    main(*sys.argv[1:])
