"""Gradients of a mix in which an image stands in many pairs: their sums have many terms of very different sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def mix_gradients(mix: Callable[..., Tensor]) -> list[Tensor]:
    """Of the same Mixup of 100 views, 50 times, by two threads."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(100, 3, 32, 32, generator=generator, requires_grad=True)
    org, aug = torch.arange(100), torch.randint(0, 10, (100,), generator=generator)
    weights = torch.randn(100, 3, 32, 32, generator=generator) * 10 ** torch.randn(100, 1, 1, 1, generator=generator)
    mixup = torch.zeros(100, dtype=torch.bool), torch.zeros(100, 4, dtype=torch.int64), torch.full((100,), 0.5)
    gradients: list[Tensor] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(50):
            gradients += torch.autograd.grad((mix(views, org, aug, *mixup) * weights).sum(), views)
    finally:
        torch.set_num_threads(threads)
    return gradients
