"""Logits of PEFT over a float model: ``make`` draws an adapter and saves it, ``load`` reads one.

python peft_logits.py make|load BASE ADAPTER TOKENS.npy OUT.npy
"""

import sys

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

mode, base, adapter, tokens, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
if mode == "make":
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, use_rslora=True, rank_pattern={"down_proj": 4},
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], alpha_pattern={"layers.0.self_attn.q_proj": 32},
    )  # fmt: skip
    model = get_peft_model(model, config)
    for name, factor in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(factor, std=0.1)
    model.save_pretrained(adapter)
else:
    model = PeftModel.from_pretrained(model, adapter)
with torch.no_grad():
    np.save(out, model.eval()(torch.tensor(np.load(tokens))).logits.numpy())
