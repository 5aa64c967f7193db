"""Muon against torch's implementation, and orthogonalisation against the SVD."""

import pytest
import torch

from trainer.optimization.muon import Muon, orthogonalise


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_singular_values_move_to_about_one_and_singular_vectors_stay() -> None:
    matrices = random(3, 16, 40)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ orthogonalise(matrices) @ right.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    torch.testing.assert_close(values, torch.diag_embed(diagonal), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_steps_are_those_of_torchs_muon_up_to_its_bfloat16(shape: tuple[int, int]) -> None:
    ours = [torch.nn.Parameter(random(*shape, seed=seed)) for seed in range(3)]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    pair = (Muon(ours, **settings), torch.optim.Muon(theirs, **settings, adjust_lr_fn="original"))
    for step in range(3):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = random(*shape, seed=100 + 10 * step + number)
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=0.01, rtol=0.01)


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    parameter = torch.nn.Parameter(random(4, 4))
    before = parameter.detach().clone()
    Muon([parameter], weight_decay=0.5).step()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_found_inf_changes_neither_weights_nor_momentum(bad: float) -> None:
    parameters = [torch.nn.Parameter(random(4, 6, seed=seed)) for seed in range(2)]
    optimizer = Muon(parameters, weight_decay=0.5)
    states = []
    for gradient, found_inf in [(1.0, 0.0), (bad, 1.0), (-2.0, 0.0)]:
        for parameter in parameters:
            parameter.grad = random(4, 6, seed=9) * gradient
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        momenta = [optimizer.state[parameter]["momentum"] for parameter in parameters]
        states.append([tensor.detach().clone() for tensor in (*parameters, *momenta)])
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices only: got a parameter of shape \(5,\)"):
        Muon([torch.nn.Parameter(torch.zeros(5))])
