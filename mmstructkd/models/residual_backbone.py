"""A backbone with an assistant beside it, whose features are added to its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, check_flag
from mmstructkd.functional.core.resize import resize_map
from mmstructkd.registry import MODELS, build_part

__all__ = ['ResidualBackbone']

BASE = 'base.'
#: Sides of a black image that tells the widths, tried in turn: some backbones run at one size only.
SIDES = (64, 224, 256, 384, 512)


@MODELS.register_module()
class ResidualBackbone(BaseModule):
    r"""Two backbones as one: at each level the sum of both, with the assistant brought to the base's width.

    .. math:: y_l = b_l(x) + P_l \, a_l(x)

    Residual Knowledge Distillation (arXiv:2002.09168): the assistant learns what
    the base leaves over of the teacher's features. With the base frozen, a squared
    distance between the sum and the teacher is just that; no target of its own is
    needed (:func:`mmstructkd.functional.residual_loss` with the base detached has
    the same value and gradient).

    :math:`P_l` is a 1x1 convolution where the widths differ, and nothing where they
    are equal. It begins at 0: the network computes at first what the base alone
    computes. An assistant of another stride is resized bilinearly to the base's map.

    The base's weights come from a plain checkpoint: where the keys of this backbone
    are missing and those of the base alone are there, these are taken. So
    ``load_from=`` of a run, and ``init_cfg`` of a model, take the checkpoint of the
    network that was trained with the base alone, with its neck and heads. A file
    saved by this backbone has the keys ``base.*``, ``assistant.*`` and
    ``projections.*``.

    Args:
        base: config of a backbone, or the built one.
        assistant: likewise; it must give as many levels.
        freeze_base: keep the base as it is: no gradient, and BatchNorm in eval.
        init_cfg: as for any module of mmengine.

    Shape:
        - input: :math:`(B, 3, H, W)`.
        - output: a tuple with a map :math:`(B, C_l, H_l, W_l)` for each level, of the
          base's shape.

    Raises:
        ConfigError: a backbone cannot be built or run on an image, the two give
            another number of levels, or (:meth:`check_weights`) the base is frozen
            and has nothing but random weights.
    """

    def __init__(
        self,
        base: dict | nn.Module,
        assistant: dict | nn.Module,
        freeze_base: bool = True,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        owner = type(self).__name__
        check_flag(owner, 'freeze_base', freeze_base)
        self.freeze_base = freeze_base
        self.base = _backbone(owner, 'base', base)
        self.assistant = _backbone(owner, 'assistant', assistant)
        widths, others = _widths(owner, 'base', self.base), _widths(owner, 'assistant', self.assistant)
        if len(widths) != len(others):
            raise ConfigError(
                f'{owner}: `assistant` must give as many levels as `base`, {len(widths)}, got {len(others)}. '
                'Set its out_indices.'
            )
        self.projections = nn.ModuleList(
            nn.Identity() if wide == narrow else nn.Conv2d(narrow, wide, 1)
            for wide, narrow in zip(widths, others, strict=True)
        )
        for projection in self.projections:
            for parameter in projection.parameters():
                nn.init.zeros_(parameter)
        # Weights given with the module are the caller's.
        self._has_weights = isinstance(base, nn.Module)
        if freeze_base:
            self.base.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialise both backbones as each would be alone."""
        super().init_weights()
        self._has_weights = self._has_weights or any(map(_reads_weights, self.base.modules()))

    def check_weights(self) -> None:
        """Refuse to train beside a frozen base that never got any weights; called when a training begins.

        Raises:
            ConfigError: see above.
        """
        if self.freeze_base and not self._has_weights:
            raise ConfigError(
                f'{type(self).__name__}: `freeze_base` must go with a base that has been trained, got random weights. '
                'Name the checkpoint of the network with the base alone in load_from=, or set freeze_base=False.'
            )

    def train(self, mode: bool = True) -> ResidualBackbone:
        """Set the mode; a frozen base stays in eval."""
        super().train(mode)
        if self.freeze_base:
            self.base.eval()
        return self

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the sums, level by level."""
        pairs = zip(_levels(self.base(inputs)), _levels(self.assistant(inputs)), self.projections, strict=True)
        return tuple(own + resize_map(project(more), tuple(own.shape[-2:])) for own, more, project in pairs)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the base's weights from a file of the base alone as well."""
        own = [key for key in self.base.state_dict() if f'{prefix}{BASE}{key}' in state_dict]
        plain = [] if own else [key for key in self.base.state_dict() if prefix + key in state_dict]
        for key in plain:
            state_dict[f'{prefix}{BASE}{key}'] = state_dict.pop(prefix + key)
        self._has_weights = self._has_weights or bool(own or plain)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _backbone(owner: str, argument: str, given: Any) -> nn.Module:
    """The module, or what a config describes."""
    if isinstance(given, nn.Module):
        return given
    example = "dict(type='ResNetV1c', depth=18)"
    made = build_part(owner, argument, given, what='backbone', example=example, known=BaseModule)
    if not isinstance(made, nn.Module):
        raise ConfigError(f'{owner}: `{argument}` must be a backbone, got {type(made).__name__}. Example: {example}.')
    return made


def _levels(outputs: Any) -> Sequence[Any]:
    return outputs if isinstance(outputs, (list, tuple)) else (outputs,)


def _widths(owner: str, argument: str, network: nn.Module) -> list[int]:
    """Widths of a backbone's levels, seen on a black image."""
    training, reasons = network.training, []
    network.eval()  # statistics stay, nothing is drawn
    try:
        for side in SIDES:
            try:
                with torch.no_grad():
                    levels = _levels(network(torch.zeros(1, 3, side, side)))
            except Exception as err:  # whatever a network runs into at a size that it is not made for
                reasons.append(f'{side}x{side}: {type(err).__name__}: {(str(err).splitlines() or [""])[0]}')
                continue
            if not levels or any(not isinstance(level, Tensor) or level.dim() != 4 for level in levels):
                raise ConfigError(
                    f'{owner}: `{argument}` must give maps of shape (B, C, H, W), got '
                    f'{[tuple(level.shape) if isinstance(level, Tensor) else type(level).__name__ for level in levels]}'
                    f' of {type(network).__name__}. Take a backbone, or its option that gives maps.'
                )
            return [int(level.shape[1]) for level in levels]
    finally:
        network.train(training)
    raise ConfigError(
        f'{owner}: `{argument}` must be a backbone that runs on an image, got {type(network).__name__}, which failed '
        f'at {reasons[0]}.'
    )


def _reads_weights(module: nn.Module) -> bool:
    """Whether a module's ``init_cfg`` names a file."""
    settings = getattr(module, 'init_cfg', None)
    several = settings if isinstance(settings, (list, tuple)) else [settings]
    return any(isinstance(one, dict) and (one.get('checkpoint') or one.get('type') == 'Pretrained') for one in several)
