"""llama.cpp through llama-cpp-python: `run_llama.py model.gguf`.

Extra weight buffer types stay off for quantised weights: on this model family they abort in 0.3.36.
"""

import sys

import llama_cpp as llama
from points import DECODE, PREFILL, STEPS, report, seconds, tokens

THREADS, UBATCH = 2, 512


def load(path):
    llama.llama_backend_init()
    settings = llama.llama_model_default_params()
    settings.use_extra_bufts = "bf16" in path
    model = llama.llama_model_load_from_file(path.encode(), settings)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    return model


def context_of(model, batch, length):
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max, settings.kv_unified = batch * length, batch, False
    settings.n_batch = settings.n_ubatch = UBATCH
    settings.n_threads = settings.n_threads_batch = THREADS
    return llama.llama_init_from_model(model, settings)


def run(context, rows):
    """One call for `(token, position, sequence, wants logits)` rows."""
    batch = llama.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    for i, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
        batch.seq_id[i][0] = sequence
    assert llama.llama_decode(context, batch) == 0
    llama.llama_batch_free(batch)


def fill(context, batch, length):
    for sequence in range(batch):
        for start in range(0, length, UBATCH):
            part = tokens(min(UBATCH, length - start))
            run(context, [(token, start + i, sequence, i == len(part) - 1) for i, token in enumerate(part)])
    llama.llama_synchronize(context)


def main(path):
    model = load(path)
    warm = context_of(model, 1, 64)
    fill(warm, 1, 16)
    llama.llama_free(warm)
    for batch, length in DECODE:
        context = context_of(model, batch, length + STEPS + 8)
        fill(context, batch, length)

        def decode(context=context, batch=batch, length=length):
            for step in range(STEPS):
                run(context, [(token, length + step, row, 1) for row, token in enumerate(tokens(batch))])
            llama.llama_synchronize(context)

        report("decode", batch * STEPS / seconds(decode), batch=batch, context=length)
        llama.llama_free(context)
    for length in PREFILL:
        context = context_of(model, 1, length + 8)
        report("prefill", length / seconds(lambda context=context, n=length: fill(context, 1, n)), tokens=length)
        llama.llama_free(context)


main(sys.argv[1])
