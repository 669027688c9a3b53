"""Log-probabilities of the token after each prefix, by vLLM's engine with an adapter beside a checkpoint's weights.

    python lora_vllm.py KERNELS BASE ADAPTER TOKENS.npy OUT.npy

KERNELS is as in ``read_vllm.py``; TOKENS are [rows, T]; writes [rows, T, V] float32, computed in float16. Each prefix
is a request of its own: with adapters ``prompt_logprobs`` fails on a CPU.
"""

import sys
from pathlib import Path

import numpy as np
import read_vllm  # first: it sets the engine's environment


def main(kernels: str, base: str, adapter: str, tokens: str, out: str) -> None:
    if kernels == "plain":
        read_vllm.plain_kernels()
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    rows = np.load(tokens)
    batches = {"max_num_seqs": 16, "max_num_batched_tokens": 512}
    llm = read_vllm.opened(Path(base), "float16", enable_lora=True, max_lora_rank=8, **batches)
    ask = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)
    prefixes = [{"prompt_token_ids": row[: i + 1].tolist()} for row in rows for i in range(rows.shape[1])]
    answers = llm.generate(prefixes, ask, lora_request=LoRARequest("adapter", 1, adapter), use_tqdm=False)
    table = read_vllm.table_of([answer.outputs[0].logprobs[0] for answer in answers])
    np.save(out, table.reshape(*rows.shape, -1))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
