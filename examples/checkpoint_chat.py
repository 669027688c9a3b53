"""Quantize a checkpoint, save it in the layout vLLM and transformers read, load it, and chat.

python examples/checkpoint_chat.py SOURCE DESTINATION "What is the capital of France?"
"""

import sys
from pathlib import Path

import awq_jax


def main(
    source: str | Path,
    destination: str | Path,
    question: str,
    calib: str = "builtin",
    samples: int = 16,
    max_new_tokens: int = 64,
    group_size: int = 128,
) -> str:
    model = awq_jax.load(source)
    report = model.quantize(calib=calib, samples=samples, group_size=group_size)
    written = model.save(destination)
    print(f"{report.bits_per_weight:.2f} bits per weight, format {written}")

    packed = awq_jax.load(destination)
    chat = packed.tokenizer is not None and bool(packed.tokenizer.chat_template)
    [answer] = packed.generate(
        question, chat=chat, max_new_tokens=max_new_tokens, stream=lambda s: print(s, end="", flush=True)
    )
    print()
    return answer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
