"""Quantize a checkpoint, save it in the layout vLLM and transformers read, load it, and chat.

python examples/checkpoint_chat.py SOURCE DESTINATION "What is the capital of France?"
"""

import sys

import awq_jax


def main(source, destination, question, calib="default", samples=16, max_new_tokens=64, **settings):
    model = awq_jax.load(source)
    report = model.quantize(calib=calib, samples=samples, **settings)
    written = model.save(destination)
    print(f"{report.bits_per_weight:.2f} bits per weight, format {written}")

    packed = awq_jax.load(destination)
    chat = bool(packed.tokenizer.chat_template)
    [answer] = packed.generate(
        question, chat=chat, max_new_tokens=max_new_tokens, stream=lambda s: print(s, end="", flush=True)
    )
    print()
    return answer


if __name__ == "__main__":
    main(*sys.argv[1:4])
