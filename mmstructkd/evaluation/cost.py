"""What a network costs: parameters, multiply-adds, seconds."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmstructkd.tasks.batches import synthetic_batch

__all__ = ['all_tensors', 'latency', 'multiply_adds', 'parameter_count']

UNCOUNTED = 3  # passes that warm caches up


def all_tensors(value: Any) -> tuple[Tensor, ...]:
    """All tensors in nested sequences, dicts and mmengine structures, in order."""
    if isinstance(value, Tensor):
        return (value,)
    if hasattr(value, 'all_items'):
        value = [item for _, item in value.all_items()]
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return tuple(tensor for item in value for tensor in all_tensors(item))
    return ()


class _Forward(nn.Module):
    """``mode='tensor'`` of a network as a function of the images alone, which can be traced.

    Args:
        network: the network.
        samples: the data samples that go with the images.
    """

    def __init__(self, network: nn.Module, samples: Any) -> None:
        super().__init__()
        self.network = network
        self.samples = samples

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return all tensors of the output."""
        return all_tensors(self.network(inputs, self.samples, mode='tensor'))


def parameter_count(network: nn.Module) -> int:
    """Count parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_adds(network: BaseModel, size: tuple[int, int]) -> int:
    """Count the multiply-adds of ``mode='tensor'`` for one image.

    What a detector does with that, such as the suppression of boxes, is not in it.

    Args:
        network: a segmentor, depth estimator or detector, in eval.
        size: (h, w) of the image; a preprocessor that pads makes it larger.

    Returns:
        One multiplication with its addition counts one.
    """
    batch = synthetic_batch(network, size, 1, training=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the tracer: sizes become constants, which is meant
        found = get_model_complexity_info(
            _Forward(network, batch['data_samples']).eval(),
            inputs=(batch['inputs'],),
            show_table=False,
            show_arch=False,
        )
    return int(found['flops'])


def latency(networks: Sequence[BaseModel], size: tuple[int, int], *, repeats: int = 40) -> list[float]:
    """Median seconds of ``mode='tensor'`` for one image, float32, on the CPU.

    Args:
        networks: in eval; measured in turns, so that a busy moment hits all alike.
        size: (h, w) of the image.
        repeats: passes per network, after three that do not count.

    Returns:
        Seconds, one for each network.
    """
    batches = [synthetic_batch(network, size, 1, training=False) for network in networks]
    times: list[list[float]] = [[] for _ in networks]
    with torch.inference_mode():
        for _ in range(UNCOUNTED + repeats):
            for network, batch, spent in zip(networks, batches, times, strict=True):
                begun = time.perf_counter()
                network(batch['inputs'], batch['data_samples'], mode='tensor')
                spent.append(time.perf_counter() - begun)
    return [statistics.median(spent[UNCOUNTED:]) for spent in times]
