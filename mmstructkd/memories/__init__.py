"""Memories: what earlier batches leave for a loss to compare with; buffers, saved and resumed."""

from mmstructkd.memories.class_queue import ClassQueue

__all__ = ['ClassQueue']
