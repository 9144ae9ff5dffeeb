"""A backbone that computes nothing: it hands on feature maps that it was given."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.model import BaseModule
from torch import Tensor

from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS

__all__ = ['GivenFeatures']


@MODELS.register_module()
class GivenFeatures(BaseModule):
    """Stands where a network expects a backbone, and returns the maps of another network.

    A self-teacher is the student's own configuration with this as its backbone:
    neck, heads and losses are those of the student's task, and what they read
    are the student's features of the same step.

    Example:
        >>> import torch
        >>> backbone = GivenFeatures()
        >>> backbone.give([torch.zeros(1, 4, 8, 8)])
        >>> [tuple(feature.shape) for feature in backbone(torch.zeros(1, 3, 32, 32))]
        [(1, 4, 8, 8)]
    """

    def __init__(self) -> None:
        super().__init__()
        self._features: tuple[Tensor, ...] | None = None

    def give(self, features: Sequence[Tensor] | None) -> None:
        """Set what the next forward passes return.

        Args:
            features: maps (B, C, H, W), with or without graph. ``None``: forget
                them, so that nothing keeps the graph of a step alive.
        """
        self._features = None if features is None else tuple(features)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the features; ``inputs`` are not looked at."""
        if self._features is None:
            raise ConfigError(
                f'{type(self).__name__}: `give` must be called before the forward pass, got no features yet. '
                'This backbone is for a SelfTeacher; it cannot run alone.'
            )
        return self._features
