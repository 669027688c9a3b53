#!/usr/bin/env bash
# lm-eval 0.4.13, its Hugging Face model (HFLM) with the default logits_cache=True.
# One would guess: a log likelihood does not depend on which other requests are scored with it.
# Seen: requests whose context and continuation make the same tokens but for the last one share one forward pass, and
# the second is read at the positions of the first one's continuation: where that one is longer, the log likelihood is
# that of the right token at a wrong position. With logits_cache=False, or with the request alone, it is right.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
pip="$dir/venv/bin/pip install --quiet --disable-pip-version-check"
# The processor's build of torch, where the index offers one.
$pip torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2 lm-eval==0.4.13
cat > "$dir/seen.py" <<'PY'
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("lm-eval", version("lm-eval"), "transformers", version("transformers"))
words = {w: i for i, w in enumerate(["<unk>", "<s>", "the", "cat", "sat", "on"])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<unk>")
torch.manual_seed(0)
sizes = {"vocab_size": 6, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=1.0)).eval()


def score(*pairs, logits_cache):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, logits_cache=logits_cache, batch_size=1)
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)
    return [round(value, 4) for value, _ in found]


long, short = ("the cat", " sat on"), ("the cat sat", " on")
ids = torch.tensor([tokenizer.encode("the cat sat")])
right = round(float(model(ids).logits[0, -1].log_softmax(-1)[words["on"]]), 4)
alone = score(short, logits_cache=True)[0]
both = {cache: score(long, short, logits_cache=cache)[1] for cache in (True, False)}
print("log p(on | the cat sat):", right, "alone:", alone, "beside another, cache on:", both[True], "off:", both[False])
assert abs(alone - right) < 1e-3 and abs(both[False] - right) < 1e-3
assert abs(both[True] - right) > 0.05
PY
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" "$dir/seen.py" 2>/dev/null
