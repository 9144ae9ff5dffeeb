"""The probe: at which size, along which way, in which mode, and what is left of it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.runner import Runner
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmstructkd.distillers import StructuredDistiller
from mmstructkd.distillers.probing import as_one_process, probe_sizes, probe_student
from mmstructkd.errors import ConfigError, TapError
from mmstructkd.registry import MODELS
from mmstructkd.run_config import config_at_hand
from mmstructkd.taps import Tap
from mmstructkd.tasks.batches import fixed_size, pipeline_size, synthetic_batch, training_info
from mmstructkd.teachers import loading
from mmstructkd.testing import toy_batch, toy_config, toy_detector, toy_distiller, toy_segmentor, toy_terms

PIXEL = dict(type='mmstructkd.PixelwiseKLLoss')
CHANNEL = dict(type='mmstructkd.ChannelwiseKLLoss')


def build(terms: dict, student: dict | None = None, teacher: dict | None = None, **changes: Any) -> StructuredDistiller:
    student = student or toy_segmentor(4)
    teacher = teacher or student
    config = toy_distiller(student=student, teacher=dict(config=teacher, allow_random=True), terms=terms, **changes)
    return MODELS.build(config).train()


def step(model: nn.Module, batch: dict | None = None) -> dict[str, Any]:
    losses = model(**(batch or toy_batch()), mode='loss')
    model.parse_losses(losses)[0].backward()
    return losses


def sized(size: Any, **changes: Any) -> dict:
    """A toy segmentor whose data preprocessor makes images of a size."""
    student = toy_segmentor(2, **changes)
    student.data_preprocessor.size = size
    return student


class Fussy(nn.Module):
    """A backbone of one stage that takes images of some sizes only."""

    def __init__(self, takes: str, img_size: Any = None) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.takes = takes
        self.seen: list[tuple[int, int]] = []
        if img_size is not None:
            self.img_size = img_size

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        height, width = x.shape[-2:]
        if not eval(self.takes, {}, {'h': height, 'w': width}):
            raise ValueError(f'{height}x{width} is not what I take')
        return [self.patch(x)]


@pytest.fixture(autouse=True)
def fussy() -> Iterator[None]:
    MODELS.register_module(name='Fussy', module=Fussy)
    yield
    MODELS.module_dict.pop('Fussy')


def fussy_segmentor(takes: str, size: Any = None, img_size: Any = None) -> dict:
    student = sized(size)
    if size is None:
        student.data_preprocessor.pop('size')
        student.data_preprocessor.size_divisor = 8
    student.backbone = dict(type='mmstructkd.Fussy', takes=takes, img_size=img_size)
    student.decode_head.update(in_channels=8, in_index=0)
    student.pop('auxiliary_head')
    return student


def level(model: StructuredDistiller, term: str = 'pixel') -> tuple[int, ...]:
    """What the probe saw at the first pair of taps, of the student."""
    return model.terms[term].levels[0].student


TERMS = dict(pixel=dict(tap='decode_head.conv_seg', loss=PIXEL))

# --- at which size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('takes', 'size', 'img_size', 'want'),
    [
        ('(h, w) == (48, 64)', (48, 64), None, (6, 8)),  # the preprocessor's
        ('(h, w) == (512, 1024)', (512, 1024), None, (64, 128)),  # as it is, where it cannot be shrunk
        ('h * w <= 512 * 256', (512, 1024), None, (32, 64)),  # shrunk, and as wide for its height
        ('(h, w) == (160, 224)', None, (160, 224), (20, 28)),  # position embeddings
        ('(h, w) == (640, 640)', None, 640, (80, 80)),
        ('h >= 200', None, None, (32, 48)),  # nobody says: as large as it must be
        ('h >= 600', None, None, (100, 168)),
        ('True', None, None, (12, 24)),
    ],
)
def test_it_probes_at_the_size_of_training(takes: str, size: Any, img_size: Any, want: tuple) -> None:
    model = build(TERMS, fussy_segmentor(takes, size, img_size))
    assert level(model)[2:] == want


def test_the_teachers_size_counts_where_the_student_has_none() -> None:
    student, teacher = fussy_segmentor('True'), fussy_segmentor('(h, w) == (224, 160)', None, (224, 160))
    assert level(build(TERMS, student, teacher))[2:] == (28, 20)


def test_probe_size_overrides() -> None:
    assert level(build(TERMS, fussy_segmentor('True', (48, 64)), probe_size=(80, 40)))[2:] == (10, 5)
    config = toy_config(toy_distiller(probe_size=[96, 64]), 'unused')
    assert level(MODELS.build(config.model))[2:] == (12, 8)
    for size in (64, (64,), (0, 64), (64.0, 64), (True, 64), 'big', (1, 2, 3)):
        with pytest.raises(ConfigError, match=r'`probe_size` must be two whole numbers \(h, w\) above 0, got'):
            build(TERMS, probe_size=size)


@pytest.mark.parametrize('role', ['student', 'teacher'])
def test_a_network_that_cannot_be_run_is_named(role: str) -> None:
    networks = dict(student=fussy_segmentor('True', (48, 64)), teacher=fussy_segmentor('True', (48, 64)))
    networks[role] = fussy_segmentor('h == 7', (48, 64))
    with pytest.raises(TapError) as caught:
        build(TERMS, **networks)
    text = str(caught.value)
    assert f'the {role} (EncoderDecoder) must run' in text
    assert "'decode_head.conv_seg'" in text
    assert "ValueError in 'backbone'" in text
    assert '48x64' in text
    assert 'probe_size=(h, w)' in text
    with pytest.raises(TapError, match=r'take \(16x24\). Set `probe_size` to the size that training feeds'):
        build(TERMS, **networks, probe_size=(16, 24))


def test_sizes_that_networks_name() -> None:
    detector = MODELS.build(toy_detector('retinanet', 2))
    assert fixed_size(detector) is None
    assert probe_sizes([detector, None])[0] == (96, 192)
    detector.bbox_head.prior_generator.input_size = 300  # as SSD's has it
    assert fixed_size(detector) == (300, 300)
    assert probe_sizes([detector])[:2] == [(300, 300), (256, 384)]
    padded = toy_detector('retinanet', 2)
    padded.data_preprocessor.batch_augments = [dict(type='BatchFixedSizePad', size=(640, 640))]
    assert fixed_size(MODELS.build(padded)) == (640, 640)
    assert probe_sizes([MODELS.build(padded)])[:2] == [(256, 256), (640, 640)]
    slides = toy_segmentor(2, test_cfg=dict(mode='slide', crop_size=(80, 96), stride=(40, 48)))
    slides.data_preprocessor.pop('size')
    assert fixed_size(MODELS.build(slides)) == (80, 96)


@pytest.mark.parametrize(
    ('steps', 'want'),
    [
        ([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], (800, 1333)),
        ([dict(type='RandomChoiceResize', scales=[(480, 1333), (800, 1333)], keep_ratio=True)], (800, 1333)),
        ([dict(type='Resize', scale=(300, 200), keep_ratio=False)], (200, 300)),
        ([dict(type='RandomResize', scale=(2048, 1024)), dict(type='RandomCrop', crop_size=(512, 640))], (512, 640)),
        ([dict(type='RandomCrop', crop_size=(0.3, 0.3), crop_type='relative_range')], None),
        ([dict(type='Resize', scale=(9, 9)), dict(type='Pad', size=(64, 32))], (32, 64)),
        ([dict(type='RandomChoice', transforms=[[dict(type='Resize', scale=(96, 64))]])], (64, 96)),
        ([dict(type='RandomFlip', prob=0.5)], None),
        ([], None),
    ],
)
def test_the_size_of_a_pipeline(steps: list[dict], want: Any) -> None:
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type='X', pipeline=steps))))
    assert pipeline_size(cfg) == want
    wrapped = dict(type='RepeatDataset', dataset=dict(type='X', pipeline=steps))
    assert pipeline_size(dict(train_dataloader=dict(dataset=wrapped))) == want
    assert pipeline_size({}) is None


def test_the_pipeline_counts_where_a_run_builds_the_distiller(tmp_path: Any) -> None:
    model = toy_distiller(student=fussy_segmentor('(h, w) == (40, 56)'), terms=TERMS)
    model.teacher = dict(config=model.student, allow_random=True)
    cfg = toy_config(model, tmp_path)
    cfg.train_dataloader.dataset.pipeline.insert(-1, dict(type='Resize', scale=(56, 40), keep_ratio=False))
    runner = Runner.from_cfg(cfg)
    assert level(runner.model)[2:] == (5, 7)
    with config_at_hand(cfg):
        assert level(MODELS.build(model))[2:] == (5, 7)
    with pytest.raises(TapError, match='must run before training'):
        MODELS.build(model)


# --- along which way -----------------------------------------------------------------------------------------


class Fails(nn.Module):
    """An operator that this machine does not have."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError('no such operator on this device')

    loss = predict = forward


@pytest.mark.parametrize('tap', ['neck[*]', 'backbone[*]', 'neck.fpn_convs.0', 'in:neck.lateral_convs.1.conv'])
def test_behind_the_features_nothing_runs(tap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmdet.models.dense_heads.RetinaHead.forward', Fails.forward)
    monkeypatch.setattr('mmdet.models.dense_heads.RetinaHead.loss', Fails.forward)
    model = build(dict(feature=dict(tap=tap, loss=CHANNEL)), toy_detector('retinanet', 2))
    assert model.terms['feature'].levels


def test_what_fails_behind_the_deepest_tap_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that cannot be computed on noise, or an operator that only the GPU has."""
    monkeypatch.setattr('mmseg.models.decode_heads.decode_head.BaseDecodeHead.loss_by_feat', Fails.forward)
    assert level(build(TERMS))[1:] == (10, 6, 8)


class Branched(nn.Module):
    """What PIDNet and DDRNet do: three outputs in training, one in inference, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.side = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        return (x, self.side(x)) if self.training else x


def branched_head() -> type:
    from mmseg.models.decode_heads import FCNHead

    class BranchedHead(FCNHead):
        """A main branch, and one that only training has, and one that only inference has."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.side_seg = nn.Conv2d(8, self.num_classes, 1)
            self.late = nn.Conv2d(self.num_classes, self.num_classes, 1)

        def forward(self, inputs: Any) -> torch.Tensor:
            if self.training:
                self.kept = self.side_seg(inputs[1])
                return self.conv_seg(inputs[0]) + self.kept
            return self.late(self.conv_seg(inputs))

    return BranchedHead


@pytest.fixture
def branched() -> Iterator[dict]:
    MODELS.register_module(name='Branched', module=Branched)
    MODELS.register_module(name='BranchedHead', module=branched_head())
    student = sized((48, 64))
    student.backbone = dict(type='mmstructkd.Branched')
    student.decode_head.update(type='mmstructkd.BranchedHead', in_channels=8, channels=8, in_index=0, num_convs=0)
    student.decode_head.norm_cfg = dict(type='BN')
    student.pop('auxiliary_head')
    yield student
    MODELS.module_dict.pop('Branched')
    MODELS.module_dict.pop('BranchedHead')


@pytest.mark.parametrize(
    'tap',
    [
        'decode_head.side_seg',
        'backbone.side',
        'backbone[1]',
        'in:decode_head.side_seg',
        dict(student='backbone[0]', teacher='backbone'),
        dict(student='decode_head.side_seg', teacher='decode_head.conv_seg'),
    ],
)
def test_what_only_training_reaches_can_be_tapped(branched: dict, tap: Any) -> None:
    model = build(dict(side=dict(tap=tap, loss=CHANNEL)), branched)
    network = model.teacher.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = step(model)
    assert first['loss_kd_side'] > 0
    assert first['loss_kd_side'].grad_fn is not None
    # the teacher took the branches of training and nothing else of it
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    batch = toy_batch()
    taps = model.terms['side'].teacher_taps
    one, two = (model.teacher.observe(batch['inputs'], batch['data_samples'], taps) for _ in range(2))
    assert torch.equal(one[taps[0]][0], two[taps[0]][0])  # no dropout


def test_what_only_inference_reaches_is_an_error_that_says_so(branched: dict) -> None:
    with pytest.raises(
        TapError,
        match="term 'late': `student` must name a module that runs in training, got 'decode_"
        "head.late', which only runs in eval",
    ):
        build(dict(late=dict(tap='decode_head.late', loss=PIXEL)), branched)
    # of the teacher it can be had
    tap = dict(student='decode_head.conv_seg', teacher='decode_head.late')
    assert step(build(dict(late=dict(tap=tap, loss=PIXEL)), branched))['loss_kd_late'] > 0


def test_auxiliary_heads_of_both_and_of_one(branched: dict) -> None:
    both = dict(aux=dict(tap='auxiliary_head.conv_seg', loss=PIXEL))
    assert step(build(both))['loss_kd_aux'] > 0
    tap = dict(student='auxiliary_head.conv_seg', teacher='decode_head.conv_seg')
    plain = toy_segmentor(4)
    plain.pop('auxiliary_head')
    assert step(build(dict(aux=dict(tap=tap, loss=PIXEL)), toy_segmentor(4), plain))['loss_kd_aux'] > 0


@pytest.mark.parametrize('tap', ['decode_head.conv_seg', 'auxiliary_head.convs', 'backbone[2]'])
def test_the_student_is_as_it_was(tap: str) -> None:
    """Weights, buffers, modes, random streams, the message hub."""
    student = MODELS.build(toy_segmentor(4)).train()
    student.backbone.layer1.eval()
    before = copy.deepcopy(student)
    hub = dict(MessageHub.get_current_instance().runtime_info)
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    config = toy_distiller(student=student, teacher=dict(config=toy_segmentor(4), allow_random=True))
    config.terms = dict(a=dict(tap=tap, loss=CHANNEL))
    MODELS.build(config)
    assert torch.equal(torch.rand(3), wanted)
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert [m.training for m in student.modules()] == [m.training for m in before.modules()]
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert dict(MessageHub.get_current_instance().runtime_info) == hub


def test_parameters_that_train_freezes_are_frozen_by_training_alone() -> None:
    from mmseg.models import EncoderDecoder

    class Freezing(EncoderDecoder):
        def train(self, mode: bool = True) -> Any:
            self.backbone.layer1.requires_grad_(False)
            return super().train(mode)

    MODELS.register_module(name='Freezing', module=Freezing)
    try:
        student = MODELS.build(toy_segmentor(4, type='mmstructkd.Freezing')).requires_grad_(True)
    finally:
        MODELS.module_dict.pop('Freezing')
    model = StructuredDistiller(student, dict(config=toy_segmentor(4), allow_random=True), TERMS)
    assert all(parameter.requires_grad for parameter in model.student.parameters())


def test_a_student_that_cannot_be_copied_is_put_back() -> None:
    """It keeps a tensor of an earlier batch, with its graph."""
    student = MODELS.build(toy_segmentor(4)).train()
    student.kept = student.extract_feat(toy_batch()['inputs'])[0]
    with pytest.raises(RuntimeError):
        copy.deepcopy(student)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    student.backbone.layer1.eval()
    modes = [module.training for module in student.modules()]
    student.register_buffer('size_seen', None)

    def remember(module: nn.Module, args: tuple) -> None:
        """What a network may do with its buffers while it runs."""
        module.size_seen = torch.tensor(args[0].shape[-2:])
        module.register_buffer('first_image', args[0][0].detach())

    student.backbone.register_forward_pre_hook(lambda _, args: remember(student, args))
    terms = dict(a=dict(tap='auxiliary_head.convs', loss=CHANNEL))
    StructuredDistiller(student, dict(config=toy_segmentor(4), allow_random=True), terms)
    assert student.size_seen is None
    assert not hasattr(student, 'first_image')
    assert student.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert [module.training for module in student.modules()] == modes
    assert student.data_preprocessor.size == (48, 64)


def test_an_initialiser_of_weights_that_were_left_out_is_said_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(loading, 'print_log', lambda text, logger, level: said.append((text, level)))

    class Pretrained(nn.Module):
        def init_weights(self) -> None:
            raise KeyError('state_dict')

    network = Pretrained()
    loading.init_without_weights(network)
    assert said == [("Pretrained stays as it was built: KeyError: 'state_dict'", logging.WARNING)]
    network.init_weights = lambda: torch.zeros(2) @ torch.zeros(3)  # nothing that missing weights explain
    with pytest.raises(RuntimeError, match='inconsistent tensor size'):
        loading.init_without_weights(network)


def test_a_student_whose_weights_must_be_there_first() -> None:
    """Sparse R-CNN's boxes are weights: those it is built with are none."""
    from mmseg.models import EncoderDecoder

    class Late(EncoderDecoder):
        """Cannot be trained before ``init_weights``."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.sides = nn.Parameter(torch.full((2,), -1.0))

        def init_weights(self) -> None:
            super().init_weights()
            nn.init.ones_(self.sides)

        def loss(self, *args: Any, **kwargs: Any) -> Any:
            if (self.sides < 0).any():
                raise RuntimeError('boxes with negative sides')
            losses = super().loss(*args, **kwargs)
            return {**losses, 'loss_sides': self.sides.square().sum()}

    MODELS.register_module(name='Late', module=Late)
    try:
        model = build(TERMS, toy_segmentor(4, type='mmstructkd.Late'), toy_segmentor(4))
    finally:
        MODELS.module_dict.pop('Late')
    assert (model.student.sides == -1).all()  # as it was built
    model.init_weights()
    assert step(model)['loss_kd_pixel'] > 0


def test_a_network_without_labels_is_probed_in_inference(caplog: pytest.LogCaptureFixture) -> None:
    """A step that cannot be tried before training is said to be so; the shapes are known all the same."""

    class Own(type(MODELS.build(toy_segmentor(2)))):
        """Wants labels that only its own pipeline makes."""

        def loss(self, inputs: Any, data_samples: Any) -> Any:
            [sample.gt_own for sample in data_samples]
            return super().loss(inputs, data_samples)

    student = toy_segmentor(4)
    MODELS.register_module(name='Own', module=Own)
    student.type = 'mmstructkd.Own'
    try:
        model = build(TERMS, student, toy_segmentor(4))
    finally:
        MODELS.module_dict.pop('Own')
    assert level(model)[1:] == (10, 6, 8)
    batch = toy_batch()
    for sample in batch['data_samples']:
        sample.set_field(1, 'gt_own')
    assert step(model, batch)['loss_kd_pixel'] > 0


# --- taps that no gradient leaves ----------------------------------------------------------------------------


def frozen(stages: int) -> dict:
    student = toy_segmentor(4)
    student.backbone.frozen_stages = stages
    return student


@pytest.mark.parametrize(
    ('student', 'tap', 'why'),
    [
        (frozen(4), 'backbone[3]', "in a frozen part of the student: nothing that is trained lies before 'backbone"),
        (frozen(2), 'backbone.layer2.0.conv1', 'in a frozen part'),
        (frozen(1), 'in:backbone.layer2', 'in a frozen part'),
        (
            toy_segmentor(4, backbone=dict(toy_segmentor(4).backbone, with_cp=True)),
            'backbone.layer3.0.conv1',
            'with_cp',
        ),
        (
            toy_segmentor(4, backbone=dict(toy_segmentor(4).backbone, with_cp=True)),
            'backbone.layer4.1.bn2',
            'checkpoint',
        ),
    ],
)
def test_a_tap_without_gradient_stops_the_first_step(student: dict, tap: str, why: str) -> None:
    connector = dict(type='mmstructkd.ConvConnector')  # which would be trained all the same
    for extra in ({}, dict(connector=connector)):
        terms = dict(feature=dict(tap=tap, loss=CHANNEL, **extra), pixel=TERMS['pixel'])
        model = build(terms, student, toy_segmentor(4))
        with pytest.raises(TapError) as caught:
            step(model)
        assert f"term 'feature': `student` must name a module that a gradient leaves in training, got {tap!r}" in str(
            caught.value
        )
        assert why in str(caught.value)
        with torch.no_grad():
            model(**toy_batch(), mode='loss')  # nobody asks for gradients


def test_outputs_of_checkpointed_blocks_are_no_matter() -> None:
    student = toy_segmentor(4, backbone=dict(toy_segmentor(4).backbone, with_cp=True))
    model = build(dict(feature=dict(tap='backbone.layer4.1', loss=CHANNEL)), student)
    assert step(model)['loss_kd_feature'] > 0


@pytest.mark.parametrize('off', [dict(schedule=dict(begin=5)), dict(loss=dict(CHANNEL, loss_weight=0.0))])
def test_a_silent_term_is_not_judged(off: dict) -> None:
    terms = dict(feature=dict(dict(tap='backbone[3]', loss=CHANNEL), **off), pixel=TERMS['pixel'])
    model = build(terms, frozen(4), toy_segmentor(4))
    assert step(model)['loss_kd_feature'] == 0
    if 'schedule' in off:
        model.terms['feature'].factor = 1.0  # as it is in the fifth iteration
        with pytest.raises(TapError, match='frozen part'):
            step(model)


def test_a_part_under_no_grad() -> None:
    class Quiet(Fussy):
        """Looks at the image without learning from it."""

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            with torch.no_grad():
                self.patch(x)
            return super().forward(x)

    MODELS.register_module(name='Quiet', module=Quiet)
    try:
        student = fussy_segmentor('True', (48, 64))
        student.backbone.type = 'mmstructkd.Quiet'
        terms = dict(feature=dict(tap='backbone.patch', loss=CHANNEL))
        with pytest.raises(TapError, match='torch.no_grad'):
            step(build(terms, student))
    finally:
        MODELS.module_dict.pop('Quiet')


def test_a_checkpoint_with_a_graph_teaches_the_same() -> None:
    """Non-reentrant checkpointing inside the block that is tapped: the gradient of no checkpointing."""
    model = build(dict(feature=dict(tap='backbone.layer4.1.conv1', loss=CHANNEL)), steady(), toy_segmentor(4))
    step(model)
    wanted = model.student.backbone.layer1[0].conv1.weight.grad.clone()
    model.zero_grad()
    block = model.student.backbone.layer4[1]
    plain = block.forward
    block.forward = lambda x: checkpoint(plain, x, use_reentrant=False)
    step(model)
    torch.testing.assert_close(model.student.backbone.layer1[0].conv1.weight.grad, wanted)


def steady() -> dict:
    """A toy segmentor without dropout, whose BatchNorm stands still."""
    student = toy_segmentor(4)
    student.decode_head.dropout_ratio = student.auxiliary_head.dropout_ratio = 0
    student.backbone.norm_eval = True
    return student


def test_an_index_on_a_module_that_returns_one_tensor() -> None:
    for tap in (
        'decode_head.conv_seg[0]',
        'backbone.layer4[1]',
        'decode_head.conv_seg[*]',
        'in:decode_head.conv_seg[0]',
    ):
        with pytest.raises(TapError, match='an index would pick an image'):
            build(dict(a=dict(tap=tap, loss=dict(type='mmstructkd.PairwiseAffinityLoss'))))


# --- its helpers ---------------------------------------------------------------------------------------------


def test_the_message_hub_forgets_what_it_was_told() -> None:
    hub = MessageHub.get_instance('probing')
    hub.update_info('iter', 7)
    with training_info(dict(train_cfg=dict(max_iters=100))):
        assert [hub.get_info(name) for name in ('iter', 'epoch', 'max_iters', 'max_epochs')] == [7, 0, 100, 1]
    assert dict(hub.runtime_info) == {'iter': 7}
    hub.state_dict()  # which checks that its keys fit
    hub.update_info('epoch', 1, resumed=False)


def test_alone_hides_the_other_processes() -> None:
    asked = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: True
    try:
        with as_one_process():
            assert not torch.distributed.is_initialized()
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.is_initialized = asked


def test_a_probe_moves_with_all_it_holds() -> None:
    tap = Tap.parse('decode_head.conv_seg')
    seen = probe_student(MODELS.build(toy_segmentor(2)), [tap], (48, 64))
    moved = seen.to('meta')
    assert moved.inputs.is_meta
    assert moved.capture.records[tap][0].is_meta
    assert all(boxes.is_meta for boxes in moved.regions.boxes)
    assert moved.regions.branches == seen.regions.branches


def test_another_device_is_tried_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a GPU: the second 'device' is the CPU again, where the operator works now."""
    homes: list[str] = []

    def forward(self: Fussy, x: torch.Tensor) -> list[torch.Tensor]:
        if not homes:
            raise RuntimeError('not implemented for CPU')
        return [self.patch(x)]

    def devices(student: nn.Module) -> Iterator[str | None]:
        yield None
        homes.append('cuda')
        yield 'cpu'

    monkeypatch.setattr(Fussy, 'forward', forward)
    monkeypatch.setattr('mmstructkd.distillers.fitting.probe_devices', devices)
    model = build(TERMS, fussy_segmentor('True', (48, 64)))
    assert level(model)[2:] == (6, 8)
    assert homes == ['cuda']
    assert step(model)['loss_kd_pixel'] > 0


def test_synthetic_samples_hold_what_a_step_needs() -> None:
    for kind in ('mask_rcnn', 'fcos'):
        model = MODELS.build(toy_detector(kind, 2)).train()
        batch = synthetic_batch(model, (64, 96), 2)
        assert ('masks' in batch['data_samples'][0].gt_instances) == (kind == 'mask_rcnn')
        step(model, batch)


def test_all_terms_of_the_toy_still_train() -> None:
    losses = step(build(toy_terms()))
    assert all(losses[f'loss_kd_{name}'].isfinite() for name in toy_terms())
