import copy
import math

import pytest
import torch
from torch import Tensor, nn

from shoal.errors import ConfigError
from shoal.training.muon import Muon, orthogonalise


def matrices(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(7, 24), (24, 7), (3, 24, 10), (2, 3, 5, 16)])
def test_update_has_singular_values_near_one_and_keeps_the_directions(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    update = orthogonalise(matrix)
    values = torch.linalg.svdvals(update)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    diagonal = left.mT @ update @ right.mT
    torch.testing.assert_close(
        diagonal, torch.diag_embed(torch.diagonal(diagonal, dim1=-2, dim2=-1)), atol=1e-4, rtol=0
    )


def test_more_steps_with_the_converging_polynomial_reach_orthogonality() -> None:
    matrix = torch.randn(6, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    update = orthogonalise(matrix, num_steps=30, coefficients=(1.875, -1.25, 0.375))
    torch.testing.assert_close(update @ update.T, torch.eye(6, dtype=torch.float64))


def test_a_zero_gradient_stays_zero() -> None:
    assert orthogonalise(torch.zeros(3, 4, 5)).abs().max() == 0.0


def test_expert_stack_moves_like_its_slices() -> None:
    (stack,) = matrices((3, 8, 5))
    slices = [nn.Parameter(stack[e].detach().clone()) for e in range(3)]
    one = Muon([stack], lr=0.1, compute_dtype=torch.float32)
    many = Muon(slices, lr=0.1, compute_dtype=torch.float32)
    for step in range(3):
        give_gradients([stack], step)
        assert stack.grad is not None
        for e, piece in enumerate(slices):
            piece.grad = stack.grad[e].clone()
        one.step()
        many.step()
    torch.testing.assert_close(stack.detach(), torch.stack([piece.detach() for piece in slices]))


@pytest.mark.parametrize(("scale", "torch_scale"), [("rms", "match_rms_adamw"), ("spectral", "original")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_plain_matrices_move_as_under_torch_muon(scale: str, torch_scale: str, nesterov: bool) -> None:
    ours, theirs = matrices((6, 17), (19, 4)), matrices((6, 17), (19, 4))
    mine = Muon(ours, 0.05, weight_decay=0.3, nesterov=nesterov, scale=scale, compute_dtype=torch.bfloat16)  # type: ignore[arg-type]
    other = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.3, nesterov=nesterov, adjust_lr_fn=torch_scale)
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        mine.step()
        other.step()
    for a, b in zip(ours, theirs):
        moved = (b.detach() - matrices((6, 17), (19, 4))[0 if a.shape[0] == 6 else 1].detach()).abs().mean()
        # The products are in bfloat16, where batched and single kernels may round differently.
        assert float((a - b).detach().abs().mean()) < 0.02 * float(moved)


def test_update_has_the_root_mean_square_of_adamw() -> None:
    for shape in ((16, 64), (96, 12)):
        (weight,) = matrices(shape)
        before = weight.detach().clone()
        optimizer = Muon([weight], lr=1.0, weight_decay=0.0, compute_dtype=torch.float32)
        give_gradients([weight], 3)
        optimizer.step()
        assert float((weight.detach() - before).square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)


def test_weight_decay_shrinks_the_weight_and_not_the_update() -> None:
    def moved(weight_decay: float) -> tuple[Tensor, Tensor]:
        (weight,) = matrices((4, 9))
        start = weight.detach().clone()
        optimizer = Muon([weight], lr=0.5, weight_decay=weight_decay, compute_dtype=torch.float32)
        give_gradients([weight], 1)
        optimizer.step()
        return start, weight.detach()

    start, plain = moved(0.0)
    _, decayed = moved(0.2)
    torch.testing.assert_close(plain - decayed, start * 0.5 * 0.2)


def test_a_parameter_without_gradient_stays() -> None:
    first, second = matrices((3, 4), (3, 4))
    before = second.detach().clone()
    optimizer = Muon([first, second], lr=0.1)
    give_gradients([first], 0)
    optimizer.step()
    assert torch.equal(second.detach(), before)


def test_resumed_from_its_state_equals_uninterrupted() -> None:
    straight = matrices((5, 8), (2, 6, 3))
    optimizer = Muon(straight, lr=0.1)
    for step in range(2):
        give_gradients(straight, step)
        optimizer.step()
    resumed = [nn.Parameter(p.detach().clone()) for p in straight]
    again = Muon(resumed, lr=0.9)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 5):
        for parameters, rule in ((straight, optimizer), (resumed, again)):
            give_gradients(parameters, step)
            rule.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed))


def test_it_minimises_a_least_squares_problem() -> None:
    generator = torch.Generator().manual_seed(5)
    target, inputs = torch.randn(6, 4, generator=generator), torch.randn(50, 4, generator=generator)
    (weight,) = matrices((6, 4))
    optimizer = Muon([weight], lr=0.2, weight_decay=0.0, momentum=0.8, compute_dtype=torch.float32)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 200)

        def loss_of() -> float:
            optimizer.zero_grad()
            loss = (inputs @ (weight - target).T).square().mean()
            loss.backward()
            return float(loss.detach())

        loss = optimizer.step(loss_of)
    assert loss < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"scale": "adam"}, "scale='adam'"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"lr": math.nan}, "lr=nan"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Muon(matrices((2, 3)), **change)  # type: ignore[arg-type]


def test_a_vector_is_sent_to_adamw() -> None:
    with pytest.raises(ConfigError, match=r"\[7\] belongs to AdamW"):
        Muon(matrices((7,)))
