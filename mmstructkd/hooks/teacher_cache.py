"""Refuses to cache a teacher behind augmentations that never repeat."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmstructkd.errors import ConfigError
from mmstructkd.registry import HOOKS
from mmstructkd.teachers.cache import unrepeatable_steps

__all__ = ['TeacherCacheHook']


@HOOKS.register_module()
class TeacherCacheHook(Hook):
    """Looks at the training pipeline before the first batch, and says at the end what the cache gave.

    An augmentation that is drawn anew each time makes an image that was never
    seen: its teacher outputs would be written and never read.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Look at the pipeline.

        Args:
            runner: the runner.

        Raises:
            ConfigError: a step of it draws anew each time.
        """
        drawing = list(dict.fromkeys(unrepeatable_steps(runner.train_dataloader.dataset)))
        if drawing:
            raise ConfigError(
                f'FrozenTeacher: `cache` must see augmentations that repeat, got {", ".join(drawing)}, drawn anew each '
                'time: no image would ever be found again. Draw from a finite set of views, with all of these steps '
                "and the packing inside: dict(type='mmstructkd.FiniteAugmentation', views=4, transforms=[...]). "
                'Without these steps, the plain images repeat by themselves.'
            )

    def after_train(self, runner: Runner) -> None:
        """Log what the cache gave.

        Args:
            runner: the runner.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for line in model.teacher.report():
            runner.logger.info(line)
