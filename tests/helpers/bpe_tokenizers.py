"""Small BPE tokenizers trained on the spot, and what GGUF files say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from awq_jax.convert import tokenizer

FIXTURE = Path(__file__).parents[1] / "convert" / "fixtures" / "autoawq-gemm"
K = "tokenizer.ggml."
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Hello, world! It's 12345.67 o'clock; we've   seen\n\n\tthree  things.",
    "naïve café — 日本語 🤗 cafe\u0301 \u00a0x",
    "def f(x):\n    return x**2  # 100%\r\n",
    "  leading and trailing  ",
    "IT'S they'LL 3 22 4444",
    "",
    " ",
    "a" * 50,
]
CORPUS = [*TEXTS, Path(tokenizer.__file__).read_text(), "The 12 cats' 345 hats weren't 6 mats. " * 20]
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# As the models' published tokenizer.json have them.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{WORDS}|\p{{N}}|{REST}"


def byte_level(pre: str) -> Tokenizer:
    """A small BPE trained on the spot, built the way the models of that kind are."""
    t = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in ("llama-bpe", "qwen2"))
    splits: dict[str, list[Any]] = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated")],
        "default": [],
    }
    t.pre_tokenizer = pre_tokenizers.Sequence([*splits[pre], level])
    if pre == "qwen2":
        t.normalizer = normalizers.NFC()
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    t.train_from_iterator(CORPUS, trainer)
    return t


def metadata_of(t: Tokenizer, pre: str, **more: Any) -> dict[str, Any]:
    model = json.loads(t.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return {
        "general.architecture": "llama",
        "llama.context_length": 2048,
        K + "model": "gpt2",
        K + "pre": pre,
        K + "tokens": tokens,
        K + "merges": [" ".join(m) for m in model["merges"]],
        K + "token_type": np.array([3 if token in SPECIAL else 1 for token in tokens], np.int32),
        K + "bos_token_id": 1,
        K + "eos_token_id": 2,
        K + "padding_token_id": 2,
        K + "unknown_token_id": 0,
        "tokenizer.chat_template": CHAT,
    } | {K + k: v for k, v in more.items()}


def spm_metadata() -> dict[str, Any]:
    """The fixture's SentencePiece vocabulary as GGUF has it: pieces and scores, but no merges."""
    vocab = json.loads((FIXTURE / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [token for token, _ in sorted(vocab.items(), key=lambda item: item[1])]
    kinds = [2, 3, 3] + [6 if t.startswith("<0x") else 1 for t in tokens[3:]]
    return {
        K + "model": "llama",
        K + "tokens": tokens,
        K + "scores": np.array([0.0 if k != 1 else 259.0 - i for i, k in enumerate(kinds)], np.float32),
        K + "token_type": np.array(kinds, np.int32),
        K + "bos_token_id": 1,
        K + "eos_token_id": 2,
        K + "unknown_token_id": 0,
    }
