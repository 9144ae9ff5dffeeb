"""The student's feature through the teacher's own head."""

from __future__ import annotations

from typing import Any

from mmcv.cnn import ConvModule
from torch import Tensor, nn
from torch.func import functional_call

from mmstructkd.connectors.base import MAX_KERNEL, Connector, check_input, check_width
from mmstructkd.errors import ConfigError, ShapeError, TapError, check_count, is_count, suggest
from mmstructkd.layers import check_layers
from mmstructkd.randomness import own_stream
from mmstructkd.registry import MODELS

__all__ = ['TeacherHeadConnector']


class _Borrowed:
    """Holds a module that belongs to somebody else: copies share it, pickles leave it out."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict) -> _Borrowed:
        return _Borrowed(self.module)

    def __reduce__(self) -> tuple[type, tuple]:
        return (_Borrowed, ())


@MODELS.register_module()
class TeacherHeadConnector(Connector):
    """Project the student's feature to the teacher's width and replay the teacher's frozen head on it.

    Semantic representational distillation (arXiv:2205.06701): a feature is good
    if the teacher's own classifier reads the same from it. 1x1 convolution,
    normalisation, ReLU, then the module ``head`` of the teacher. The loss
    compares its output with the teacher's: tap the student before its
    classifier and the teacher behind its own,
    ``tap=dict(student='in:decode_head.conv_seg', teacher='decode_head.conv_seg')``
    with ``head='decode_head.conv_seg'``. Differs from the authors' code, which
    works on one vector an image: here every position is read.

    The head runs in eval (no dropout, running statistics), with its parameters
    frozen, and draws what random numbers it needs from the teacher's own stream
    of the step, not from the student's; the gradient passes through it to the student. It stays
    the teacher's: in no ``parameters()``, no ``state_dict()``, no copy; a
    pickled connector has to be attached again.

    Args:
        in_channels: width of the student's feature.
        out_channels: width of the teacher's tap, behind the head; not used.
        head: dotted name of a module of the teacher, from a map to a map.
        head_channels: the width that the head expects. ``None``: that of its
            first layer.
        kernel_size: of the projection, odd.
        norm_cfg: normalisation of the projection.
        act_cfg: activation of the projection.

    Raises:
        ConfigError: a width is out of range, the head's width is not to be
            found, or the connector is used before it is attached.
        TapError: the teacher has no module of that name.
        ShapeError: the head does not give a single map.

    Example:
        >>> import torch
        >>> teacher = nn.ModuleDict({'classifier': nn.Conv2d(8, 2, 1)})
        >>> connector = TeacherHeadConnector(3, 2, head='classifier')
        >>> connector.attach(teacher)
        >>> connector(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 2, 4, 4])
    """

    needs_teacher = True
    paper = 'Knowledge Distillation Meets Open-Set Semi-Supervised Learning (arXiv:2205.06701)'

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        head: str,
        head_channels: int | None = None,
        kernel_size: int = 1,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_width(owner, 'in_channels', in_channels)
        check_width(owner, 'out_channels', out_channels)
        if head_channels is not None:
            check_width(owner, 'head_channels', head_channels)
        check_count(owner, 'kernel_size', kernel_size, maximum=MAX_KERNEL)
        if kernel_size % 2 == 0:
            raise ConfigError(f'{owner}: `kernel_size` must be odd, got {kernel_size!r}.')
        self.head = head
        self.head_channels = head_channels
        self._settings: dict[str, Any] = {
            'in_channels': in_channels,
            'kernel_size': kernel_size,
            'padding': kernel_size // 2,
            'norm_cfg': {'type': 'BN'} if norm_cfg is None else dict(norm_cfg),
            'act_cfg': {'type': 'ReLU'} if act_cfg is None else dict(act_cfg),
        }
        self.projection: nn.Module | None = None
        self._borrowed = _Borrowed()
        self._step = 0

    def set_progress(self, step: int, last: int) -> None:
        """Follow the training, for the random stream.

        Args:
            step: iterations done so far.
            last: those of the whole training.
        """
        self._step = step

    def attach(self, network: nn.Module) -> None:
        """Take the head from the teacher's network, and build the projection to its width.

        May be called again, with the same network moved or copied elsewhere.

        Args:
            network: the teacher's network.
        """
        owner = type(self).__name__
        modules = dict(network.named_modules())
        if self.head not in modules or not self.head:
            raise TapError(
                f'{owner}: `head` must name a module of {type(network).__name__}, got {self.head!r}. '
                f'{suggest(self.head, [name for name in modules if name])}'
            )
        head = modules[self.head]
        if self.projection is None:
            expected = _expected_width(head)
            if None not in (expected, self.head_channels) and expected != self.head_channels:
                raise ConfigError(
                    f'{owner}: `head_channels` must be the {expected} channels that {self.head!r} expects, '
                    f'got {self.head_channels}. Leave it out.'
                )
            width = self.head_channels or expected
            if width is None:
                raise ConfigError(
                    f'{owner}: `head_channels` must be given for {self.head!r}, got None: '
                    f'no layer of {type(head).__name__} says which width it expects.'
                )
            self.head_channels = width
            check_layers(owner, width, norm_cfg=self._settings['norm_cfg'], act_cfg=self._settings['act_cfg'])
            self.projection = ConvModule(out_channels=width, **self._settings)
        self._borrowed = _Borrowed(head)

    def forward(self, student: Tensor) -> Tensor:
        """Return what the teacher's head reads from the student, a map."""
        owner = type(self).__name__
        head = self._borrowed.module
        if head is None or self.projection is None:
            raise ConfigError(
                f'{owner}: `attach` must be called with the teacher before the first forward, got no call yet. '
                'It needs a teacher that is a network.'
            )
        check_input(owner, student, self._settings['in_channels'])
        feature = self.projection(student)
        # The teacher is in eval all the time; whoever changed that gets it back as it was.
        training = [module for module in head.modules() if module.training]
        for module in training:
            module.training = False
        try:
            frozen = {name: parameter.detach() for name, parameter in head.named_parameters()}
            with own_stream(feature.device, self._step):
                out = functional_call(head, frozen, (feature,))
        finally:
            for module in training:
                module.training = True
        if not isinstance(out, Tensor):
            raise ShapeError(
                f'{owner}: `head` must name a module that gives one tensor, got {type(out).__name__} from '
                f'{self.head!r}. Name a layer inside it.'
            )
        return out

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'head={self.head!r}, head_channels={self.head_channels}'


def _expected_width(head: nn.Module) -> int | None:
    """Width of the input of a module, from the first layer in it that has one."""
    for module in head.modules():
        for name in ('in_channels', 'in_features', 'num_features', 'num_channels'):
            width = getattr(module, name, None)
            if is_count(width):
                return width
    return None
