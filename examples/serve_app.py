"""An engine inside an app of one's own: many requests at once, each an async iterator.

python examples/serve_app.py ./model-awq
"""

import argparse
import asyncio

import awq_jax
from awq_jax.serve import Engine, Sampling

PROMPTS = ("Once upon a time", "The little dog", "One day, a girl named Lily", "Tom had a red ball")


async def tell(engine: Engine, prompt: str, seed: int, new_tokens: int) -> None:
    """One user of the app: the answer arrives piece by piece, while others are written as well."""
    stream = engine.submit(prompt, Sampling(temperature=0.7, top_p=0.9, seed=seed), max_new_tokens=new_tokens)
    text = "".join([piece.text async for piece in stream])
    print(f"--- {prompt}\n{text.strip()} ({stream.request.finish_reason}, {stream.request.made} tokens)")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory, .gguf file or hub id")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt and its answer")
    args = parser.parse_args()
    awq_jax.cache_programs()  # so that the next start compiles nothing
    engine = Engine(awq_jax.load(args.model), slots=4, length=args.length)
    print(engine.explain())
    try:
        await asyncio.gather(*[tell(engine, p, seed, args.new_tokens) for seed, p in enumerate(PROMPTS)])
    finally:
        engine.stop(drain=False)


if __name__ == "__main__":
    asyncio.run(main())
