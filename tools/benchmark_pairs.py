"""The pairs of networks that ``benchmark.py`` times, and its ways to train a student."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import benchmark_mmrazor as mmrazor
import torch
from benchmark_measure import seconds
from mmengine.config import Config
from torch import Tensor, nn

from mmstructkd.registry import MODELS
from mmstructkd.tasks.batches import synthetic_batch
from mmstructkd.teachers.loading import build_network, model_config
from mmstructkd.testing import toy_depth_estimator, toy_detector, toy_segmentor

ROOT = Path(__file__).resolve().parents[1]
STUDENT, BARE, OURS, MMRAZOR = 'student alone', 'student + teacher forward', 'mmstructkd', 'mmrazor'
COMPILED = ('compile', 'all')
#: Options of the teacher by the name of the arm; 'cached' is added where its folder is known.
OPTIONS: dict[str, dict[str, Any]] = {
    OURS: {},
    'fuse_conv_bn': dict(fuse_conv_bn=True),
    'channels_last': dict(channels_last=True),
    'bf16': dict(dtype='bf16'),
    'bf16, contiguous': dict(dtype='bf16', channels_last=False),
    'compile': dict(compile=True),
    'every=4': dict(every=4),
    'bf16, fused': dict(fuse_conv_bn=True, dtype='bf16'),
    'all': dict(fuse_conv_bn=True, channels_last=True, dtype='bf16', compile=True),
    'cached': {},
}
ARMS = (STUDENT, BARE, *OPTIONS, MMRAZOR)


@dataclass(frozen=True)
class Pair:
    """A teacher, a student and what is transferred.

    Attributes:
        title: what it is, in words.
        student: config of the student.
        teacher: config of the teacher.
        terms: of this package.
        size: (h, w) of the images.
        batch_size: number of images.
        mmrazor: the same terms for mmrazor; ``None`` where it has none like them.
    """

    title: str
    student: dict
    teacher: dict
    terms: dict[str, dict]
    size: tuple[int, int]
    batch_size: int = 2
    mmrazor: dict[str, dict] | None = field(default=None)


def _plain(config: Any, size: tuple[int, int] | None = None) -> dict:
    """A model's config for one process, without weights to download, at a size of input."""
    config = model_config(config, 'benchmark') if isinstance(config, str) else config
    if size is not None:
        config.data_preprocessor['size'] = size

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if value.get('type') == 'SyncBN':
                value['type'] = 'BN'
            for inner in value.values():
                walk(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                walk(inner)

    walk(config)
    return config


def _channelwise(tap: str, weight: float) -> dict[str, dict]:
    loss = dict(type='mmstructkd.ChannelwiseKLLoss', temperature=1.0, loss_weight=weight)
    return dict(channelwise=dict(tap=tap, loss=loss))


def _channelwise_mmrazor(modules: list[str], weight: float) -> dict[str, dict]:
    return dict(channelwise=dict(modules=modules, loss=dict(type='ChannelWiseDivergence', tau=1, loss_weight=weight)))


STRUCTKD = dict(
    pixel=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=10.0)),
    pairwise=dict(tap='decode_head.bottleneck', loss=dict(type='mmstructkd.PairwiseAffinityLoss', preset='paper')),
    holistic=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.HolisticLoss', loss_weight=1e-3)),
)
LEVELS = [f'neck.fpn_convs.{level}' for level in range(5)]


def _pspnet(depth: int, size: tuple[int, int]) -> dict:
    return _plain(f'mmseg::pspnet/pspnet_r{depth}-d8_4xb2-80k_cityscapes-512x1024.py', size)


def _retinanet(depth: int) -> dict:
    config = _plain('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    if depth == 18:
        config.backbone.depth = 18
        config.neck.in_channels = [64, 128, 256, 512]
    return config


def _depth(depth: int, size: tuple[int, int]) -> dict:
    config = Config.fromfile(ROOT / 'configs' / '_base_' / 'models' / 'depth_fpn_r101.py').model
    config.pop('pretrained', None)
    config._scope_ = 'mmseg'
    config.backbone.depth = depth
    config.neck.in_channels = [64, 128, 256, 512] if depth == 18 else [256, 512, 1024, 2048]
    config.decode_head.type = 'mmstructkd.DepthRegressionHead'
    config.decode_head.update(min_depth=0.1, max_depth=10.0)
    return _plain(config, size)


def pairs(quick: bool = False) -> dict[str, Callable[[], Pair]]:
    """What can be timed, by name.

    Args:
        quick: networks of a few channels instead.
    """
    small, middle, wide = (128, 256), (256, 512), (256, 320)
    if quick:
        size = (64, 64)
        segmentor = _plain(toy_segmentor(4), size), _plain(toy_segmentor(8), size)
        for config in segmentor:  # mmrazor's teacher draws as well, so that with it the student would lose others
            config.decode_head.dropout_ratio = config.auxiliary_head.dropout_ratio = 0
        detector, estimator = toy_detector('retinanet', 4), toy_depth_estimator(4)
        structkd = copy.deepcopy(STRUCTKD)
        structkd['pairwise']['tap'] = 'decode_head.convs'
        structkd['holistic']['loss']['critic'] = dict(base_channels=4)
        return {
            'pspnet_cwd': lambda: Pair(
                'toy FCN, CWD on logits',
                *segmentor,
                _channelwise('decode_head.conv_seg', 5.0),
                size,
                mmrazor=_channelwise_mmrazor(['decode_head.conv_seg'], 5.0),
            ),
            'pspnet_structkd': lambda: Pair('toy FCN, StructKD', *segmentor, structkd, size),
            'retinanet_cwd': lambda: Pair(
                'toy RetinaNet, CWD on the pyramid',
                detector,
                copy.deepcopy(detector),
                _channelwise('neck[*]', 50.0),
                size,
                mmrazor=_channelwise_mmrazor(LEVELS, 10.0),
            ),
            'depth_cwd': lambda: Pair(
                'toy depth estimator, CWD on features',
                _plain(estimator, size),
                copy.deepcopy(_plain(estimator, size)),
                _channelwise('decode_head.convs', 50.0),
                size,
                mmrazor=_channelwise_mmrazor(['decode_head.convs'], 50.0),
            ),
        }
    return {
        'pspnet_cwd': lambda: Pair(
            'PSPNet R50 to R18, CWD on logits',
            _pspnet(18, small),
            _pspnet(50, small),
            _channelwise('decode_head.conv_seg', 5.0),
            small,
            mmrazor=_channelwise_mmrazor(['decode_head.conv_seg'], 5.0),
        ),
        'pspnet_structkd': lambda: Pair(
            'PSPNet R50 to R18, StructKD (PI, PA, HO)', _pspnet(18, middle), _pspnet(50, middle), STRUCTKD, middle
        ),
        'retinanet_cwd': lambda: Pair(
            'RetinaNet R50 to R18, CWD on the pyramid',
            _retinanet(18),
            _retinanet(50),
            _channelwise('neck[*]', 50.0),
            wide,
            mmrazor=_channelwise_mmrazor(LEVELS, 10.0),
        ),
        'depth_cwd': lambda: Pair(
            'depth on FPN R50 to R18, CWD on the last feature',
            _depth(18, small),
            _depth(50, small),
            _channelwise('decode_head.convs', 50.0),
            small,
            mmrazor=_channelwise_mmrazor(['decode_head.convs'], 50.0),
        ),
    }


# --- arms ----------------------------------------------------------------------------------------------------


class Arm:
    """One way to train the student, a step at a time.

    Args:
        name: name of the arm.
        model: what is trained; ``mode='loss'`` gives its losses.
        batch: ``inputs`` and ``data_samples``.
        autocast: makes the context that the forward runs in.
        before: what a step does first (a bare forward of the teacher).
        networks: modules besides the model whose tensors it needs.
        ask: runs what it asks of the teacher in a step, alone; ``None``: nothing.

    Attributes:
        period: steps after which the work repeats; a turn is that many.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        batch: Mapping[str, Any],
        autocast: Callable[[], contextlib.AbstractContextManager],
        before: Callable[[], Any] | None = None,
        networks: Iterable[nn.Module] = (),
        ask: Callable[[], Any] | None = None,
    ) -> None:
        self.name, self.model, self.batch, self.autocast, self.before = name, model, batch, autocast, before
        self.ask = ask
        self.networks = tuple(networks)
        self.teacher = getattr(model, 'teacher', None) if hasattr(model, 'terms') else None
        self.period = 1 if self.teacher is None else self.teacher.period
        self.count = 0
        shared, own = [p for p in model.parameters() if p.requires_grad], []
        if hasattr(model, 'auxiliary_parameters'):
            own = [p for _, params in model.auxiliary_parameters()[1] for p in params]
            taken = {id(p) for p in own}
            shared = [p for p in shared if id(p) not in taken]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(shared, lr=1e-3, momentum=0.9)]
        if own:
            self.optimizers.append(torch.optim.Adam(own, lr=1e-4))

    def step(self) -> dict[str, Tensor]:
        """Train one step and return the losses."""
        if self.teacher is not None:
            for term in self.model.terms.values():
                term.interval_factor = self.teacher.interval_factor(self.count)
        self.count += 1
        with self.autocast():
            if self.before is not None:
                self.before()
            losses = self.model(**self.batch, mode='loss')
            total, shown = self.model.parse_losses(losses)
        total.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return shown

    def seconds(self) -> float:
        """Time of a step, mean over a turn."""
        return seconds(lambda: [self.step() for _ in range(self.period)], self.device) / self.period

    @property
    def device(self) -> str:
        """Where it runs."""
        return str(self.batch['inputs'].device.type)

    def teacher_seconds(self) -> float:
        """Time of what is asked of the teacher in a step, alone."""

        def run() -> None:
            with self.autocast(), torch.no_grad():
                self.ask()

        return seconds(run, self.device)

    def term_seconds(self) -> float:
        """Time of the terms alone, forward and backward to the taps; 0 where there are none."""
        if self.teacher is None:
            return 0.0
        with self.autocast():
            _, seen = self.model.observe(**self.batch, terms=list(self.model.terms.values()))
        for tensors in seen.student.values():
            tensors[:] = [tensor.detach().requires_grad_() for tensor in tensors]

        def run() -> None:
            with self.autocast():
                scored = [value for losses in self.model.score(seen).values() for value in losses.values()]
            torch.stack(scored).sum().backward()

        took = seconds(run, self.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return took

    def held_bytes(self) -> int:
        """What stays between two steps: weights of both networks and the optimisers' states."""
        modules = [self.model, *self.networks]
        if self.teacher is not None:
            modules += self.teacher.held_modules()
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        for optimizer in self.optimizers:
            tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


class Workshop:
    """Builds the arms of a pair from the same weights and the same batch.

    Args:
        pair: the pair.
        device: ``'cpu'`` or ``'cuda'``.
        amp: run the student under bf16 autocast.
        batch_size: replaces the pair's.
        size: replaces the pair's.
    """

    def __init__(
        self, pair: Pair, device: str, amp: bool, batch_size: int | None = None, size: tuple[int, int] | None = None
    ) -> None:
        self.pair, self.device, self.amp = pair, device, amp
        self._folder = tempfile.TemporaryDirectory(prefix='benchmark_')
        self.folder = Path(self._folder.name)
        torch.manual_seed(0)
        student = build_network(pair.student, 'benchmark')
        student.init_weights()
        self.weights = copy.deepcopy(student.state_dict())
        teacher = build_network(pair.teacher, 'benchmark')
        teacher.init_weights()
        torch.save(teacher.state_dict(), self.folder / 'teacher.pth')
        self.batch = synthetic_batch(student.to(device), size or pair.size, batch_size or pair.batch_size)
        for place, sample in enumerate(self.batch['data_samples']):
            sample.set_metainfo({'img_path': f'{place}.png'})

    def close(self) -> None:
        """Remove what was written."""
        self._folder.cleanup()

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, dtype=torch.bfloat16) if self.amp else contextlib.nullcontext()

    def _student(self) -> nn.Module:
        student = build_network(self.pair.student, 'benchmark')
        student.load_state_dict(self.weights)
        student.to(self.device)
        student.train()
        return student

    def _teacher(self) -> nn.Module:
        teacher = build_network(self.pair.teacher, 'benchmark')
        teacher.load_state_dict(torch.load(self.folder / 'teacher.pth', weights_only=True))
        return teacher.to(self.device)

    def build(self, name: str) -> Arm | str:
        """Build an arm.

        Args:
            name: one of :data:`ARMS`.

        Returns:
            The arm, or why there is none.
        """
        torch.manual_seed(1)
        if name == STUDENT:
            return Arm(name, self._student(), self.batch, self._autocast)
        if name == BARE:
            teacher = self._teacher().requires_grad_(False)
            teacher.eval()

            @torch.no_grad()
            def forward() -> None:
                teacher(**self.batch, mode='tensor')

            return Arm(name, self._student(), self.batch, self._autocast, forward, [teacher], forward)
        if name == MMRAZOR:
            if self.pair.mmrazor is None:
                return 'mmrazor has no such terms'
            reason = mmrazor.available()
            if reason is not None:
                return reason
            model = mmrazor.build_distiller(self._student(), self._teacher(), self.pair.mmrazor)

            def ask() -> None:
                model.teacher(**self.batch, mode='loss')

            return Arm(name, model.to(self.device), self.batch, self._autocast, ask=ask)
        options = dict(OPTIONS[name])
        if name == 'cached':
            options['cache'] = dict(folder=str(self.folder / 'cache'))
        checkpoint = str(self.folder / 'teacher.pth')
        model = MODELS.build(
            dict(
                type='mmstructkd.StructuredDistiller',
                student=self._student(),
                teacher=dict(config=copy.deepcopy(self.pair.teacher), checkpoint=checkpoint, **options),
                terms=copy.deepcopy(self.pair.terms),
            )
        )
        taps = [tap for term in model.terms.values() for tap in term.teacher_taps]

        def observe() -> None:
            model.teacher.observe(**self.batch, taps=taps)

        return Arm(name, model.to(self.device).train(), self.batch, self._autocast, ask=observe)


@contextlib.contextmanager
def workshop(*args: Any, **kwargs: Any) -> Iterator[Workshop]:
    """A :class:`Workshop` that cleans up."""
    made = Workshop(*args, **kwargs)
    try:
        yield made
    finally:
        made.close()
