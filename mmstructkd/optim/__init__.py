"""Optimiser parts: one wrapper for student and critic, bf16 without a scaler."""

from mmstructkd.optim.autocast_wrapper import AutocastOptimWrapper
from mmstructkd.optim.composite import CompositeOptimizer
from mmstructkd.optim.constructor import DistillOptimWrapperConstructor

__all__ = ['AutocastOptimWrapper', 'CompositeOptimizer', 'DistillOptimWrapperConstructor']
