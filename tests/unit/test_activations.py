"""SiLU against PyTorch's own, up to the third derivative."""

from __future__ import annotations

import torch

from steradian.compiler.activations import silu


def derivative(function, x, order):
    y = x.detach().requires_grad_()
    value = function(y).sum()
    for _ in range(order):
        (gradient,) = torch.autograd.grad(value, y, create_graph=True)
        value = gradient.sum()
    return gradient


def test_silu_and_its_derivatives():
    x = torch.cat([torch.linspace(-6, 6, 25), torch.tensor([0.0, -80.0, 80.0])]).double()
    assert torch.equal(silu(x), torch.nn.functional.silu(x))
    for order in (1, 2, 3):
        expected = derivative(torch.nn.functional.silu, x, order)
        assert torch.allclose(derivative(silu, x, order), expected, rtol=0, atol=1e-14)
        assert expected.abs().max() > 0.05
    x.requires_grad_()
    assert torch.autograd.gradcheck(silu, x)
    assert torch.autograd.gradgradcheck(silu, x)


def test_under_functorch_it_is_pytorchs_own():
    x = torch.linspace(-2, 2, 5).double()
    slopes = torch.func.vmap(torch.func.grad(silu))(x)
    assert torch.allclose(slopes, derivative(torch.nn.functional.silu, x, 1))
