"""Optimiser parts: one wrapper for student and critic, its step, bf16 without a scaler."""

from mmstructkd.optim.autocast_wrapper import AutocastOptimWrapper
from mmstructkd.optim.composite import CompositeOptimizer
from mmstructkd.optim.constructor import DistillOptimWrapperConstructor, check_optimizer, for_distiller
from mmstructkd.optim.step import DistillStep, extend_wrapper

__all__ = [
    'AutocastOptimWrapper',
    'CompositeOptimizer',
    'DistillOptimWrapperConstructor',
    'DistillStep',
    'check_optimizer',
    'extend_wrapper',
    'for_distiller',
]
