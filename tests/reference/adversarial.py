"""The adversarial terms, written out as loops over scores and images."""

from __future__ import annotations

import torch
from torch import Tensor


def critic_loss(student_score: Tensor, teacher_score: Tensor, mode: str) -> Tensor:
    fake, real = student_score.reshape(-1), teacher_score.reshape(-1)
    total = student_score.new_zeros(())
    for low, high in zip(fake, real, strict=True):
        if mode == 'wgan':
            total = total + low - high
        else:
            if 1 + low > 0:
                total = total + 1 + low
            if 1 - high > 0:
                total = total + 1 - high
    return total / fake.numel()


def adversarial_loss(student_score: Tensor) -> Tensor:
    total = student_score.new_zeros(())
    for score in student_score.reshape(-1):
        total = total - score
    return total / student_score.numel()


def gradient_penalty(critic, student_map: Tensor, teacher_map: Tensor, u: Tensor) -> Tensor:
    """One batch, as BatchNorm ties its images together; the norm as a loop over entries."""
    mixed = [float(u[b]) * teacher_map[b] + (1 - float(u[b])) * student_map[b] for b in range(len(u))]
    between = torch.stack(mixed).detach().requires_grad_()
    slope = torch.autograd.grad(critic(between).sum(), between, create_graph=True)[0]
    total = student_map.new_zeros(())
    for b in range(len(u)):
        square = student_map.new_zeros(())
        for entry in slope[b].reshape(-1).split(64):
            square = square + (entry * entry).sum()
        total = total + (square.sqrt() - 1) ** 2
    return total / len(u)
