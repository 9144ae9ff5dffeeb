"""Compares what two runs have left, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def assert_same(first: Any, second: Any, where: str = '') -> None:
    """Compare nested values to the last bit."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, np.ndarray):
        assert np.array_equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            assert_same(first[key], second[key], f'{where}.{key}')
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f'{where}[{i}]')
    else:
        assert first == second, where
