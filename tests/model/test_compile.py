"""`torch.compile` traces what the C++ kernels would do from their references, and computes the same."""

import torch

from shoal.model.transformer import Transformer, initialise
from shoal.presets import preset


def outcome(model, token_BS, document_BS):
    model.zero_grad()
    out_BSD = model(token_BS, document_BS=document_BS)
    out_BSD.square().sum().backward()
    return out_BSD.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_compiled_layers_give_the_same_values_and_gradients():
    model = Transformer(preset("demo").replace(num_hidden_layers=2, num_nextn_predict_layers=0, vocab_size=97))
    initialise(model, 0)
    token_BS = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    document_BS = torch.arange(24).ge(9).long().expand(2, 24).contiguous()
    eager = outcome(model, token_BS, document_BS)
    for layer in model.layers:
        # The training loop's `layer.compile()` without code generation, which takes a minute.
        layer.compile(backend="aot_eager")
    compiled = outcome(model, token_BS, document_BS)
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-4, atol=1e-4)
    for found, expected in zip(compiled[1], eager[1]):
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
