"""Hides parts of the student's feature and generates the teacher's from the rest."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import get_dist_info
from torch import Tensor, nn

from mmstructkd.connectors.base import Connector, check_input, check_width
from mmstructkd.errors import ConfigError, check_finite_number, check_seed
from mmstructkd.registry import MODELS

__all__ = ['MaskedGenerationConnector']


@MODELS.register_module()
class MaskedGenerationConnector(Connector):
    r"""Mask positions at random, then generate: 3x3 convolution, ReLU, 3x3 convolution.

    .. math:: G(M \odot \phi(f)), \quad M_i = 0 \text{ with probability } \lambda, \text{ else } 1

    Of MGD (arXiv:2205.01529), for
    :class:`~mmstructkd.losses.masked_generation.MaskedGenerationLoss`. The 1x1
    convolution :math:`\phi` is there where the widths differ. A position is
    hidden in all channels. Trained with the student, dropped from its
    checkpoint; the term fills in both widths from the probe.

    The mask is drawn from a generator of its own, made of the seed and a step
    counter that are saved with the module: a resumed run goes on exactly, the
    student alone sees the same random numbers as the distilled one, and several
    processes draw what one would for their joint batch. In eval mode the mask is
    the coming step's and the counter stays.

    Args:
        in_channels: width of the student's feature.
        out_channels: width of the teacher's feature.
        ratio: probability lambda that a position is hidden, in [0, 1]. The
            authors' code has 0.65 for one-stage detectors, 0.45 for two-stage
            ones, 0.75 for segmentation.
        seed: of the masks, an integer of at least 0; ``None`` draws one from
            the global generator.

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> connector = MaskedGenerationConnector(4, 6, seed=0)
        >>> connector(torch.zeros(2, 4, 5, 3)).shape
        torch.Size([2, 6, 5, 3])
    """

    paper = 'Masked Generative Distillation (arXiv:2205.01529)'
    stream: Tensor

    def __init__(self, in_channels: int, out_channels: int, ratio: float = 0.65, seed: int | None = None) -> None:
        super().__init__()
        owner = type(self).__name__
        for name, value in (('in_channels', in_channels), ('out_channels', out_channels)):
            check_width(owner, name, value)
        check_finite_number(owner, 'ratio', ratio, minimum=0)
        if ratio > 1:
            raise ConfigError(f'{owner}: `ratio` must be a probability in [0, 1], got {ratio!r}.')
        check_seed(owner, seed)
        self.ratio = float(ratio)
        self.in_channels = in_channels
        self.align = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.generation = nn.Sequential(
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        seed = int(torch.randint(2**31 - 1, ())) if seed is None else seed
        # Seed and step of the masks, as they are saved.
        self.register_buffer('stream', torch.tensor([seed, 0]))
        self._stream: list[int] | None = None

    def forward(self, student: Tensor) -> Tensor:
        """Return the generated feature, shape (B, out_channels, H, W)."""
        check_input(type(self).__name__, student, self.in_channels)
        aligned = self.align(student)
        shown = self.shown(aligned.shape[0], (aligned.shape[2], aligned.shape[3]), aligned.device)
        # Not a product: what is hidden must not pass on a NaN.
        generated: Tensor = self.generation(torch.where(shown[:, None], aligned, 0))
        return generated

    def shown(self, batch: int, size: tuple[int, int], device: torch.device | str = 'cpu') -> Tensor:
        """Draw the next mask.

        Of the numbers for the joint batch of all processes, a process takes
        those of its images as mmengine's samplers deal them out, every n-th.

        Args:
            batch: number of images B.
            size: (H, W).
            device: where to draw. Devices draw different numbers.

        Returns:
            Bool, shape (B, H, W), ``False`` with probability ``ratio``.
        """
        if self._stream is None:
            # Read once, not every step: on an accelerator the host waits for it.
            self._stream = [int(number) for number in self.stream.tolist()]
        seed, step = self._stream
        rank, world_size = get_dist_info()
        generator = torch.Generator(device=device).manual_seed((seed * 1_000_003 + step) % 2**63)
        drawn = torch.rand((batch * world_size, *size), generator=generator, device=device)
        if self.training:
            self._stream[1] += 1
            self.stream[1] += 1
        return drawn[rank::world_size] >= self.ratio

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._stream = None

    def extra_repr(self) -> str:
        """Show the ratio in the model's print-out."""
        return f'ratio={self.ratio:g}'
