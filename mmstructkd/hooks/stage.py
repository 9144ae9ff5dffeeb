"""Says when a stage of a training begins, and refuses stages that a training never reaches."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmstructkd.errors import ConfigError
from mmstructkd.registry import HOOKS

__all__ = ['StageHook']


@HOOKS.register_module()
class StageHook(Hook):
    """Looks at the stages of a distiller before the first batch, and logs where each begins.

    What a stage changes is a function of the step: the distiller follows it by itself
    (``set_progress``, called by :class:`TermScheduleHook`), and so does a resumed run.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._told: Any = None

    def before_train(self, runner: Runner) -> None:
        """Compare the stages with the length of the training.

        Args:
            runner: the runner.

        Raises:
            ConfigError: a stage begins when the training is over.
        """
        self._told = None
        for place, stage in enumerate(_model(runner).stages):
            if stage.begin >= runner.max_iters:
                raise ConfigError(
                    f'StructuredDistiller: `stages[{place}]` must begin before the training ends, got iteration '
                    f'{stage.begin} of {runner.max_iters}. End the stage before it earlier, or train longer.'
                )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Log a stage that begins.

        Args:
            runner: the runner.
            batch_idx: unused.
            data_batch: unused.
        """
        model = _model(runner)
        stage = model.stage
        if stage is not None and stage is not self._told:
            self._told = stage
            number = model.stages.index(stage) + 1
            runner.logger.info(f'Stage {number} of {len(model.stages)}, from iteration {stage.begin}: {stage}')


def _model(runner: Runner) -> Any:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
