"""What looking for NaN adds to a step: losses, gradients and running statistics before each update."""

from __future__ import annotations

import gc
from typing import Any

import benchmark_pairs as arms
import torch
from benchmark_measure import seconds, spread
from mmengine.optim import build_optim_wrapper

from mmstructkd.optim import for_distiller

__all__ = ['measure']


def measure(
    name: str,
    pair: arms.Pair,
    *,
    device: str,
    amp: bool,
    batch_size: int,
    size: tuple[int, int],
    rounds: int,
    warmup: int,
) -> dict[str, Any]:
    """Time a step through the distiller's optim wrapper, and the check in it alone.

    The check takes a hundredth of a step or less, which two timed steps differ
    by anyway. So it is timed by itself, with the gradients of a step, and the
    ratio is that of the step to the step less the check.

    Args:
        name: of the pair.
        pair: the pair.
        device: ``'cpu'`` or ``'cuda'``.
        amp: run the student under bf16 autocast.
        batch_size: number of images.
        size: (h, w) of the images.
        rounds: turns that count.
        warmup: turns before that do not.

    Returns:
        Spread of the seconds of a step and of the check, and of their ratio.
    """
    with arms.workshop(pair, device, amp, batch_size, size) as shop:
        model, batch = shop.build(arms.OURS).model, shop.batch
        settings = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3, momentum=0.9))
        wrapper = build_optim_wrapper(model, for_distiller(settings, model))
        accelerated = device != 'cpu'

        def loss() -> torch.Tensor:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=amp):
                return model.parse_losses(model(**batch, mode='loss'))[0]

        def step() -> None:
            wrapper.update_params(loss())
            wrapper.check_last_step()

        def check() -> None:
            wrapper._examine(total.detach())
            if not accelerated:
                wrapper.check_last_step()

        steps, checks = [], []
        for number in range(warmup + rounds):
            gc.collect()
            gc.disable()
            try:
                took = seconds(step, device)
                total = loss()
                total.backward()
                alone = seconds(check, device)
            finally:
                gc.enable()
            wrapper.check_last_step()
            wrapper.zero_grad()
            if number >= warmup:
                steps.append(took)
                checks.append(alone)
    ratios = [took / (took - alone) for took, alone in zip(steps, checks, strict=True)]
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return dict(
        pair=name,
        title=pair.title,
        precision='amp' if amp else 'fp32',
        size=list(size),
        batch_size=batch_size,
        parameters=parameters,
        step=spread(steps),
        check=spread(checks),
        ratio=spread(ratios),
    )
