"""Holistic distillation: a critic judges whole maps of student and teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import get_dist_info
from torch import Tensor, nn
from torch.func import functional_call

from mmstructkd.errors import (
    ConfigError,
    ShapeError,
    check_finite_number,
    check_flag,
    check_ndim,
    check_one_of,
    check_same,
    check_seed,
)
from mmstructkd.functional.core.binary import as_two_classes
from mmstructkd.functional.core.depth import depth_of_disparity, depth_readings, normalize_depth
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.holistic import ADVERSARIAL_MODES, adversarial_loss, critic_loss, gradient_penalty
from mmstructkd.losses.base import DistillLoss
from mmstructkd.losses.depth_base import OUTPUTS
from mmstructkd.optimizers import check_optimizer
from mmstructkd.registry import MODELS, build_part
from mmstructkd.structures import Targets

__all__ = ['HolisticLoss']

NORMALIZATIONS = ('depth', 'log_depth')

_DEFAULT_CRITIC = 'mmstructkd.SAGANCritic'
_PUBLISHED_SGD = {'type': 'SGD', 'lr': 4e-4, 'momentum': 0.9, 'weight_decay': 5e-4}
_DEFAULTS: dict[str, Any] = {
    'mode': 'wgan',
    'loss_weight': 1e-3,
    'critic_weight': 0.1,
    'softmax': False,
    'conditional': False,
    'optimizer': {'type': 'Adam', 'lr': 4e-4, 'betas': (0.9, 0.99)},
}
_PRESETS: dict[str, dict[str, Any]] = {
    'paper': {
        'mode': 'wgan',
        'gradient_penalty_weight': 10.0,
        'loss_weight': 0.1,
        'critic_weight': 0.1,
        'softmax': True,
        'conditional': True,
        'optimizer': _PUBLISHED_SGD,
        'batch_norm': False,
    },
    'code': {
        'mode': 'wgan',
        'gradient_penalty_weight': 10.0,
        'loss_weight': 0.1,
        'critic_weight': 0.1,
        'softmax': False,
        'conditional': False,
        'optimizer': _PUBLISHED_SGD,
        'batch_norm': True,
    },
}


@MODELS.register_module()
class HolisticLoss(DistillLoss):
    r"""The student's maps shall look like the teacher's to a critic that learns along.

    .. math::
        L = -\lambda_G \overline{D(z^s)}, \qquad
        L_D = \lambda_d \left( \overline{D(z^s)} - \overline{D(z^t)}
              + 10 \, \overline{(\lVert \nabla D(\hat z) \rVert_2 - 1)^2} \right)

    Holistic term of Structured Knowledge Distillation (arXiv:1903.04197); see
    :func:`~mmstructkd.functional.holistic.critic_loss`,
    :func:`~mmstructkd.functional.holistic.adversarial_loss` and
    :func:`~mmstructkd.functional.holistic.gradient_penalty` for the parts.
    Tap class scores or a depth map of both networks.

    **One backward.** Both objectives are returned together and can be summed
    and differentiated once. The student's part passes through the critic with
    its parameters frozen; the critic's part sees detached maps. The critic is
    evaluated in the published order (student for the student's step; then
    teacher, student, and what lies between them for its own), so the updates of
    student and critic, and the critic's buffers, are those of the published two
    steps. The authors step the student first and the critic second, on the same
    maps and with the same critic, so that nothing depends on which comes first.

    ========================  ==============  =============  =============
    argument                  default         ``'paper'``    ``'code'``
    ========================  ==============  =============  =============
    mode                      wgan            wgan           wgan
    gradient_penalty_weight   10 (hinge: 0)   10             10
    loss_weight               1e-3            0.1            0.1
    critic_weight             0.1             0.1            0.1
    softmax                   no              yes            no
    conditional               no              yes            no
    critic's BatchNorm        yes             no             yes
    optimizer                 Adam 4e-4       SGD 4e-4       SGD 4e-4
    ========================  ==============  =============  =============

    ``'paper'``: the critic sees class probabilities beside the resized image,
    as the paper says and the first branch of the authors' code (``cvpr_19``)
    does; ``'code'`` is their master branch. Both use SGD with momentum 0.9 and
    weight decay 5e-4. The default is master's critic with the optimiser and
    weights of the authors' follow-up (TorchDistiller); its Adam has betas 0.9
    and 0.99. Differs from the first branch: the gradient penalty's norm is over
    the map alone, not over the image beside it, and the interpolation is between
    probabilities, not between logits.

    **Depth.** The paper's critic also judges depth maps, the teacher's as the real
    ones. ``normalize='depth'`` hands it maps from which the mean of the teacher's
    is taken and which are divided by the range of the teacher's, image by image
    (``'log_depth'``: of the logarithms), see
    :func:`~mmstructkd.functional.core.depth.normalize_depth`: what it judges is then
    of one size for near and far scenes, and errors of the student's scale stay
    visible. Where the teacher has no reading, a pixel does not count.

    Args:
        critic: config of the critic; ``type`` defaults to ``SAGANCritic``, and
            ``in_channels`` is filled in from the probe. ``None``: its defaults.
            Any module that maps (maps, images or ``None``) to scores with B
            first will do, if its parts are twice differentiable.
        preset: ``'paper'``, ``'code'`` or ``None``. A preset fixes the values of
            its column; an argument that says otherwise is an error.
        mode: ``'wgan'`` or ``'hinge'``.
        loss_weight: :math:`\lambda_G`, factor of the student's part.
        critic_weight: :math:`\lambda_d`, factor of the critic's objective. With
            0 the critic does not learn: it stays as it was drawn.
        gradient_penalty_weight: factor of the gradient penalty within it.
        softmax: judge probabilities over the channels, not the tensors tapped.
        conditional: show the critic the image beside the map.
        optimizer: config of the critic's own optimiser.
        normalize: ``'depth'`` or ``'log_depth'`` for maps of one channel in
            metres; ``None``: the tensors as they are tapped.
        teacher_output: what the teacher predicts where depth is judged:
            ``'depth'``, ``'disparity'`` (one over depth, turned into depth) or
            the ``'same'`` as the student.
        seed: of the critic's initial weights and of the interpolation.
            ``None``: drawn from the global generator when the critic is built.

    Shape:
        - student, teacher: :math:`(B, C, H, W)`, the same in all four, or one
          channel (a sigmoid) beside two; the teacher is detached here.
        - output: ``{'': student's part, 'critic': critic's objective}``, scalars
          of at least float32, no unit, means over the scores of the images.

    Pixels without a label count, as in the published code (``where='inside'``).
    Those that do not (padding) are zero in both maps, after the softmax, and in
    the interpolation, so that they get no gradient and do not enter the penalty's
    norm. Images without a pixel that counts leave every mean; where no image is
    left, both parts are 0 with a graph.

    The interpolation draws from its own generator, made of the seed and a step
    counter that are saved with the module. So a resumed run goes on exactly, and
    the student alone sees the same random numbers as the distilled one.

    With several processes the draws are those for their joint batch, and the
    critic's BatchNorm normalises over it, so that n processes equal one.

    Costs four forward passes of the critic and a second-order backward pass.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset, or
            the loss runs before :meth:`bind`.
        ShapeError: the maps of student and teacher differ, or the image that a
            conditional critic needs is missing.

    Example:
        >>> loss = HolisticLoss(critic=dict(base_channels=8), seed=0)
        >>> student, teacher = torch.zeros(2, 5, 65, 65, requires_grad=True), torch.ones(2, 5, 65, 65)
        >>> loss.bind(student, teacher)
        >>> sorted(loss(student, teacher))
        ['', 'critic']
    """

    tasks = ('seg', 'depth')
    transfers = 'how real a whole map looks to a critic'
    paper = 'Structured Knowledge Distillation for Dense Prediction (arXiv:1903.04197)'
    # A 1x1 convolution would let the student hide behind it: classes must be the same ones.
    needs_equal_channels = False
    needs_equal_size = True

    stream: Tensor

    def __init__(
        self,
        critic: Mapping[str, Any] | None = None,
        *,
        preset: str | None = None,
        mode: str | None = None,
        loss_weight: float | None = None,
        critic_weight: float | None = None,
        gradient_penalty_weight: float | None = None,
        softmax: bool | None = None,
        conditional: bool | None = None,
        optimizer: Mapping[str, Any] | None = None,
        normalize: str | None = None,
        teacher_output: str = 'depth',
        seed: int | None = None,
    ) -> None:
        owner = type(self).__name__
        given = {
            'mode': mode,
            'loss_weight': loss_weight,
            'critic_weight': critic_weight,
            'gradient_penalty_weight': gradient_penalty_weight,
            'softmax': softmax,
            'conditional': conditional,
            'optimizer': None if optimizer is None else dict(optimizer),
        }
        critic = {} if critic is None else dict(critic)
        settings = _settle(owner, preset, given, critic)
        super().__init__(loss_weight=settings['loss_weight'])

        self.preset = preset
        self.mode = settings['mode']
        self.critic_weight = float(settings['critic_weight'])
        self.gradient_penalty_weight = float(settings['gradient_penalty_weight'])
        self.softmax: bool = settings['softmax']
        self.over_classes = self.softmax
        self.conditional: bool = settings['conditional']
        self.needs_images = self.conditional
        if normalize is not None:
            check_one_of(owner, 'normalize', normalize, NORMALIZATIONS)
            if self.softmax:
                raise ConfigError(
                    f'{owner}: `normalize` must be left out with softmax=True, got {normalize!r}. '
                    'A depth map has one channel, and no probabilities.'
                )
        self.normalize = normalize
        check_one_of(owner, 'teacher_output', teacher_output, OUTPUTS)
        if teacher_output == 'disparity' and normalize is None:
            raise ConfigError(
                f"{owner}: `normalize` must be 'depth' or 'log_depth' with teacher_output='disparity', got None."
            )
        self.teacher_output = None if normalize is None else teacher_output
        self.by_class = normalize is None
        self.own_optimizer = dict(settings['optimizer'])
        check_seed(owner, seed)
        self.seed = seed
        self.channels: int | None = None
        self.critic: nn.Module | None = None
        self.critic_config = critic
        # Seed and step of the interpolation's random numbers.
        self.register_buffer('stream', torch.zeros(2, dtype=torch.int64))
        self._stream: list[int] | None = None

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Build the critic for the channels of the probed maps.

        The same seed gives the same critic; the global generator is used only
        to draw a seed where none was given. A second call with maps of as
        many channels keeps the critic.

        Args:
            student: a probed map of the student, (B, C, H, W).
            teacher: the probed map of the teacher, the same shape.

        Raises:
            ShapeError: the maps are not 4-D, or their channels differ.
        """
        owner = type(self).__name__
        student, teacher = as_two_classes(student, teacher, alone=self.softmax)
        self._check_maps(student, teacher)
        channels = student.shape[1]
        if self.normalize is not None and channels != 1:
            raise ShapeError(
                f'{owner}: `student` must be a depth map, shape (B, 1, H, W), for normalize={self.normalize!r}, '
                f'got {tuple(student.shape)}. Tap the depth, or leave `normalize` out.'
            )
        if self.critic is not None:
            self._check_channels(student)
            return
        seed = int(torch.randint(2**31 - 1, ())) if self.seed is None else self.seed
        image_channels = {'image_channels': 3} if self.conditional else {}
        config = {'type': _DEFAULT_CRITIC, **image_channels, **self.critic_config, 'in_channels': channels}
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator alone: `torch.manual_seed` would reseed the accelerators too.
            torch.default_generator.manual_seed(seed)
            critic = build_part(owner, 'critic', config, example="dict(type='mmstructkd.SAGANCritic')", known=nn.Module)
        if not isinstance(critic, nn.Module):
            raise ConfigError(f'{owner}: `critic` must be a module, got {type(critic).__name__}.')
        # What does not learn is no parameter for an optimiser, whose decay would move it all the same.
        critic.requires_grad_(self.critic_weight > 0)
        self.critic = critic.to(self.stream.device).train(self.training)
        self.channels = channels
        self.stream.copy_(torch.tensor([seed, 0]))
        self._stream = None

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Return the student's part (key ``''``) and the critic's weighted objective (``'critic'``)."""
        if torch.compiler.is_compiling():
            # Compiled code has no second derivative. Asked here and not written as a decorator,
            # since `disable` imports the whole compiler.
            outside: dict[str, Tensor] = torch.compiler.disable(self._compute)(student, teacher, targets)
            return outside
        return self._compute(student, teacher, targets)

    @full_precision
    def _compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> dict[str, Tensor]:
        owner = type(self).__name__
        critic = self.critic
        if critic is None:
            raise ConfigError(
                f'{owner}: `bind` must be called before the loss, got no call yet. '
                'Hand it one probed pair of maps: it builds the critic for their channels.'
            )
        student, teacher = as_two_classes(student, teacher, alone=self.softmax)
        self._check_maps(student, teacher)
        self._check_channels(student)
        if self.teacher_output == 'disparity':
            teacher = depth_of_disparity(teacher.detach())
        images = self._images(targets)
        valid = self.counting(student, targets)
        teacher = teacher.detach()
        if self.normalize is not None:
            readings = depth_readings(teacher)
            valid = readings if valid is None else valid & readings
            log = self.normalize == 'log_depth'
            student, teacher = (normalize_depth(depth, teacher, log=log, valid=valid) for depth in (student, teacher))
        ignored = None if valid is None else ~valid.unsqueeze(1)
        some = None if valid is None else valid.flatten(1).any(dim=1)

        def masked(maps: Tensor) -> Tensor:
            return maps if ignored is None else maps.masked_fill(ignored, 0)

        def judge(maps: Tensor) -> Tensor:
            scores: Tensor = critic(masked(maps), images)
            return scores

        map_s = self._as_map(student)
        map_t = self._as_map(teacher)

        # The order of the four passes is the published one: the power iterations of the
        # spectral norm and the statistics of BatchNorm move with each.
        frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}
        adversarial = adversarial_loss(
            functional_call(critic, frozen, (masked(map_s), images)), mode=self.mode, valid=some
        )

        if self.critic_weight == 0:
            return {'': adversarial, 'critic': adversarial.new_zeros(())}
        map_s = map_s.detach()
        score_t = judge(map_t)
        score_s = judge(map_s)
        objective = critic_loss(score_s, score_t, mode=self.mode, valid=some)
        if self.gradient_penalty_weight > 0:
            weights = self.interpolation_weights(map_s.shape[0])
            penalty = gradient_penalty(judge, map_s, map_t, weights=weights, valid=some)
            objective = objective + self.gradient_penalty_weight * penalty
        return {'': adversarial, 'critic': self.critic_weight * objective}

    def interpolation_weights(self, batch: int) -> Tensor:
        """Draw the next u of the gradient penalty, one an image, in [0, 1).

        Each step has its own generator. Of the numbers for the joint batch of
        all processes, a process takes those of its images as mmengine's samplers
        deal them out (every n-th), so that n processes equal one.

        Args:
            batch: number of images B.

        Returns:
            Shape (B,), on the CPU.
        """
        if self._stream is None:
            # Read once, not every step: on an accelerator the host would wait for it.
            self._stream = [int(number) for number in self.stream.tolist()]
        seed, step = self._stream
        rank, world_size = get_dist_info()
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        drawn = torch.rand(batch * world_size, generator=generator)
        if self.training:
            self._stream[1] += 1
            self.stream[1] += 1
        return drawn[rank::world_size]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._stream = None

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return (
            f'{super().extra_repr()}, mode={self.mode!r}, critic_weight={self.critic_weight:g}, '
            f'gradient_penalty_weight={self.gradient_penalty_weight:g}, softmax={self.softmax}, '
            f'conditional={self.conditional}, normalize={self.normalize!r}'
        )

    def _as_map(self, tensor: Tensor) -> Tensor:
        """What the critic judges: probabilities or the tensor itself, in the critic's precision."""
        maps = tensor.softmax(dim=1) if self.softmax else tensor
        dtype = next((p.dtype for p in self.parameters()), maps.dtype)
        return maps.to(dtype)

    def _images(self, targets: Targets) -> Tensor | None:
        if not self.conditional:
            return None
        if targets.images is None:
            raise ShapeError(
                f'{type(self).__name__}: `targets.images` must be the input, shape (B, 3, H, W), for '
                'conditional=True, got None. Set conditional=False for a critic that does not see the image.'
            )
        return targets.images

    def _check_maps(self, student: Tensor, teacher: Tensor) -> None:
        owner = type(self).__name__
        check_ndim(owner, 'student', student, 4, '(B, C, H, W)')
        check_ndim(owner, 'teacher', teacher, 4, '(B, C, H, W)')
        check_same(
            owner,
            student,
            teacher,
            range(4),
            'B, C, H and W',
            'The critic compares maps of the same classes: tap the class scores of both networks, '
            'and give them the same classes.',
        )

    def _check_channels(self, student: Tensor) -> None:
        if student.shape[1] != self.channels:
            raise ShapeError(
                f'{type(self).__name__}: `student` must have the {self.channels} channels that the critic was built '
                f'for, got {tuple(student.shape)}. Use one term for each number of channels.'
            )


def _settle(owner: str, preset: str | None, given: Mapping[str, Any], critic: dict[str, Any]) -> dict[str, Any]:
    """Fill in the preset or the defaults, check the values, and complete ``critic`` in place."""
    if preset is not None:
        check_one_of(owner, 'preset', preset, tuple(_PRESETS))
    fixed = dict(_PRESETS[preset]) if preset is not None else {}
    batch_norm = fixed.pop('batch_norm', None)
    for name, value in fixed.items():
        if given[name] is not None and given[name] != value:
            raise ConfigError(
                f'{owner}: `{name}` must be {value!r} with preset={preset!r}, got {given[name]!r}. '
                f'Leave `{name}` out, or the preset, and name every argument.'
            )
    if batch_norm is not None:
        kind = critic.get('type', _DEFAULT_CRITIC)
        name = kind if isinstance(kind, str) else getattr(kind, '__name__', repr(kind))
        if name.rpartition('.')[2] != 'SAGANCritic':
            raise ConfigError(
                f'{owner}: `critic` must be a SAGANCritic with preset={preset!r}, got {name!r}. Leave the preset out.'
            )
        if critic.setdefault('batch_norm', batch_norm) != batch_norm:
            raise ConfigError(
                f"{owner}: `critic['batch_norm']` must be {batch_norm} with preset={preset!r}, "
                f'got {critic["batch_norm"]!r}. Leave it out, or the preset.'
            )

    settings = {**_DEFAULTS, **{name: value for name, value in given.items() if value is not None}, **fixed}
    check_one_of(owner, 'mode', settings['mode'], ADVERSARIAL_MODES)
    # Hinge in published use has no penalty; the spectral norm alone bounds the slope.
    settings.setdefault('gradient_penalty_weight', 10.0 if settings['mode'] == 'wgan' else 0.0)
    for name in ('softmax', 'conditional'):
        check_flag(owner, name, settings[name])
    check_finite_number(owner, 'critic_weight', settings['critic_weight'], minimum=0)
    check_finite_number(owner, 'gradient_penalty_weight', settings['gradient_penalty_weight'], minimum=0)
    check_optimizer(owner, settings['optimizer'])
    if 'in_channels' in critic:
        raise ConfigError(
            f"{owner}: `critic['in_channels']` must be left out, got {critic['in_channels']!r}. The probe fills it in."
        )
    if critic.get('image_channels') and not settings['conditional']:
        raise ConfigError(
            f"{owner}: `critic['image_channels']` must be 0 with conditional=False, got {critic['image_channels']!r}. "
            'Set conditional=True to show the critic the image.'
        )
    return settings
