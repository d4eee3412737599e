import torch

from shoal.model.transformer import Transformer, initialise
from shoal.training import loss as loss_module
from shoal.training.loss import (
    IGNORED,
    LossWeights,
    batch_loss,
    cross_entropy,
    labels_ahead,
    mtp_acceptance,
    token_log_probabilities,
)
from tests.model.test_mla import TINY


def _model(**changes):
    model = Transformer(TINY.replace(**changes))
    initialise(model, 0)
    return model


def test_chunked_cross_entropy_equals_pytorch_in_value_and_gradient(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 61 * 3)
    model = _model()
    hidden = torch.randn(2, 5, 40, requires_grad=True)
    label = torch.randint(0, 61, (2, 5))
    label[0, 2] = label[1, 4] = IGNORED
    weight = model.lm_head.weight
    fast = cross_entropy(model, hidden, label)
    slow = torch.nn.functional.cross_entropy(
        (hidden @ weight.t()).flatten(0, 1), label.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert fast.num_tokens == 8 and torch.allclose(fast.total, slow, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad(2 * fast.total, (hidden, weight)), torch.autograd.grad(2 * slow, (hidden, weight))
    ):
        assert torch.allclose(a, b, atol=1e-5)
    best = (hidden @ weight.t()).argmax(-1)
    assert torch.equal(fast.best_BS[label != IGNORED], best[label != IGNORED])
    assert fast.best_BS[0, 2] == -1


def test_no_labels_give_zero_and_no_nan():
    model = _model()
    hidden = torch.randn(1, 3, 40, requires_grad=True)
    empty = cross_entropy(model, hidden, torch.full((1, 3), IGNORED))
    (gradient,) = torch.autograd.grad(empty.total, hidden)
    assert float(empty.total) == 0 and torch.equal(gradient, torch.zeros_like(gradient))


def test_chunked_log_probabilities_equal_pytorch(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 61 * 2)
    model = _model()
    hidden, token = torch.randn(7, 40, requires_grad=True), torch.randint(0, 61, (7,))
    weight, grad = model.lm_head.weight, torch.randn(7)
    fast, entropy = token_log_probabilities(model, hidden, token, temperature=0.7)
    every = ((hidden @ weight.t()) / 0.7).log_softmax(-1)
    slow = every.gather(1, token.unsqueeze(1)).squeeze(1)
    assert torch.allclose(fast, slow, atol=1e-5) and torch.allclose(entropy, -(every.exp() * every).sum(-1), atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(fast, (hidden, weight), grad), torch.autograd.grad(slow, (hidden, weight), grad)
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_labels_ahead_stop_at_documents_and_row_ends():
    label = torch.tensor([[11, 12, IGNORED, 21, 22, IGNORED, IGNORED]])
    document = torch.tensor([[0, 0, 0, 1, 1, 1, -1]])
    assert labels_ahead(label, document, 1).tolist() == [[12, IGNORED, IGNORED, 22, IGNORED, IGNORED, IGNORED]]
    assert labels_ahead(label, None, 2).tolist() == [[IGNORED, 21, 22, IGNORED, IGNORED, IGNORED, IGNORED]]


def test_prediction_ahead_is_trained_on_the_token_after_next():
    """Gradients of the MTP loss at position i must not depend on tokens past i + 2."""
    model = _model(num_nextn_predict_layers=1)
    token = torch.randint(0, 61, (1, 8))
    hidden = model(token)
    (head,) = model.predict_ahead(hidden, token)
    changed = token.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 61
    (other,) = model.predict_ahead(model(changed), changed)
    assert torch.allclose(head[0, :4], other[0, :4], atol=1e-5) and not torch.allclose(
        head[0, 4], other[0, 4], atol=1e-3
    )


def test_acceptance_counts_drafts_that_the_main_head_confirms():
    model = _model(num_nextn_predict_layers=1)
    label = torch.randint(0, 61, (2, 6))
    main = cross_entropy(model, torch.randn(2, 6, 40), label)
    draft = cross_entropy(model, torch.randn(2, 6, 40), label)
    draft.best_BS[:, :-1] = main.best_BS[:, 1:]
    assert mtp_acceptance(main, [draft]) == [(10, 10)]
    draft.best_BS[0, 0] = (main.best_BS[0, 1] + 1) % 61
    assert mtp_acceptance(main, [draft]) == [(9, 10)]


def test_the_objective_does_not_depend_on_how_a_step_is_cut():
    model = _model(num_nextn_predict_layers=1)
    token, label = torch.randint(0, 61, (4, 6)), torch.randint(0, 61, (4, 6))
    label[2, 3:] = IGNORED
    weights = LossWeights(sequence_balance=0.0)
    total = int((label != IGNORED).sum())

    def gradients(parts):
        model.zero_grad()
        for rows in parts:
            batch_loss(
                model, token[rows], label[rows], None, None, weights=weights, step_tokens=total
            ).objective.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    whole, cut = gradients([slice(0, 4)]), gradients([slice(0, 1), slice(1, 4)])
    for name, gradient in whole.items():
        assert torch.allclose(gradient, cut[name], atol=1e-6), name
