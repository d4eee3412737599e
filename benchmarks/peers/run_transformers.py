"""transformers, eager, bfloat16: `run_transformers.py MODEL`."""

import sys

import torch
from points import DECODE, PREFILL, STEPS, report, seconds
from transformers import AutoModelForCausalLM

torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()


def read(batch, length):
    ids = torch.randint(2, 32000, (batch, length))
    return model(ids, use_cache=True, logits_to_keep=1).past_key_values


read(1, 32)
for batch, length in DECODE:
    cache = read(batch, length)
    token = torch.randint(2, 32000, (batch, 1))
    model(token, past_key_values=cache, use_cache=True)

    def decode(cache=cache, token=token):
        for _ in range(STEPS // 2):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

    report("decode", batch * (STEPS // 2) / seconds(decode), batch=batch, context=length)
    del cache
for length in PREFILL:
    report("prefill", length / seconds(lambda n=length: read(1, n)), tokens=length)
