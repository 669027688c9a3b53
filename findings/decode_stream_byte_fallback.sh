#!/usr/bin/env bash
# tokenizers 0.23.3: DecodeStream with a byte-fallback tokenizer (Llama 2's and Gemma's kind).
# One would guess: any sequence of ids can be streamed, with replacement characters where bytes are no UTF-8, as decode
# gives them for the whole sequence.
# Seen: the ByteFallback decoder judges a run of byte tokens as one, so that a byte that comes later turns a letter that
# was released already into a replacement character, and the next step raises "Invalid prefix encountered".
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cat > "$dir/seen.py" <<'PY'
from importlib.metadata import version
from tokenizers import Tokenizer, decoders, models

print("tokenizers", version("tokenizers"))
vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)} | {"b": 257}
tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
ids = [vocab["<0x75>"], vocab["<0xF6>"], vocab["b"]]
whole = tokenizer.decode(ids)
stream, pieces, error = decoders.DecodeStream(skip_special_tokens=False), [], ""
try:
    for i in ids:
        pieces.append(stream.step(tokenizer, i))
except Exception as e:
    error = str(e).partition(".")[0]
print("decode:", ascii(whole), "streamed:", pieces, "then:", error)
assert (whole, pieces) == ("\ufffd\ufffdb", ["u", None])
assert error == "Invalid prefix encountered while decoding stream", error
PY
"$dir/venv/bin/python" "$dir/seen.py"
