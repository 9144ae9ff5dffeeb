"""Structured knowledge distillation for MMSegmentation and MMDetection.

Importing this package is cheap: the mathematics lies in
:mod:`mmstructkd.functional` (pure torch), the registered parts load through
:mod:`mmstructkd.registry` when a config first names one of them.
"""

__version__ = '0.1.0'

__all__ = ['__version__']
