"""What depends on the task: what a batch knows, and batches to try a network with."""

from mmstructkd.tasks.area import valid_area
from mmstructkd.tasks.targets import collect_targets, head_of, num_classes_of, probe_targets, task_of

__all__ = ['collect_targets', 'head_of', 'num_classes_of', 'probe_targets', 'task_of', 'valid_area']
