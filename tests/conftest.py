"""Shared by all tests: random numbers begin alike, and mmengine's global state ends with each test."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Seed every generator, and forget mmengine's named singletons (scope, visualizer, hub, logger) afterwards."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    if 'mmengine' in sys.modules:
        _forget_singletons()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _forget_singletons() -> None:
    from mmengine.utils import ManagerMixin

    classes = list(ManagerMixin.__subclasses__())
    for cls in classes:
        classes += cls.__subclasses__()
    for cls in classes:
        for instance in cls._instance_dict.values():
            # A logger keeps its file open, a visualizer its writers.
            for handler in getattr(instance, 'handlers', ()):
                handler.close()
            if hasattr(instance, '_vis_backends'):
                instance.close()
        cls._instance_dict.clear()
