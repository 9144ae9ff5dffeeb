"""The distiller as a model: what it owns, what it hides, what one step does."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import get_state_dict, load_state_dict
from torch import nn

from mmstructkd.distillers import StructuredDistiller
from mmstructkd.errors import ConfigError, ShapeError, TapError
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_batch, toy_distiller, toy_segmentor, toy_terms


def build(**changes) -> StructuredDistiller:
    """Build a toy distiller."""
    return MODELS.build(toy_distiller(**changes))


def step(model: nn.Module, seed: int = 0) -> dict:
    """One forward and backward in training mode."""
    model.train()
    losses = model(**toy_batch(seed=seed), mode='loss')
    total, _ = model.parse_losses(losses)
    total.backward()
    return losses


def test_one_step_trains_all_that_is_trained() -> None:
    model = build()
    before = copy.deepcopy(model.teacher.network.state_dict())
    losses = step(model)
    names = {name for name in losses if name.startswith('loss_kd_')}
    assert names == {f'loss_kd_{n}' for n in ('pixel', 'pairwise', 'feature', 'holistic', 'holistic_critic')}
    assert all(torch.isfinite(losses[name]) for name in names)
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    after = model.teacher.network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_teacher_is_no_part_of_the_model() -> None:
    model = build()
    student = MODELS.build(toy_segmentor(4))
    owned = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    hidden = [*model.teacher.network.parameters(), *model.teacher.network.buffers()]
    assert hidden
    assert not any(id(t) in owned for t in hidden)
    assert list(model.state_dict()) == list(student.state_dict())
    assert not any('teacher' in name for name, _ in model.named_modules())
    assert not any(p.requires_grad for p in model.teacher.network.parameters())


def test_the_teacher_stays_in_eval_and_moves_along() -> None:
    model = build()
    model.train()
    assert not any(m.training for m in model.teacher.network.modules())
    model.double()
    assert {p.dtype for p in model.teacher.network.parameters()} == {torch.float64}


def test_copies_share_the_teacher_until_one_moves() -> None:
    model = build()
    step(model)
    twin = copy.deepcopy(model)
    assert twin.teacher.network is model.teacher.network
    twin.double()
    assert {p.dtype for p in model.teacher.network.parameters()} == {torch.float32}


def test_copy_and_pickle_after_a_step() -> None:
    model = build()
    step(model)
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    torch.manual_seed(0)
    expected = {k: v.item() for k, v in step(model, seed=1).items()}
    for twin in twins:
        assert list(twin.state_dict()) == list(model.state_dict())
        assert {k: v.shape for k, v in twin.terms.state_dict().items()} == {
            k: v.shape for k, v in model.terms.state_dict().items()
        }
        torch.manual_seed(0)
        assert {k: v.item() for k, v in step(twin, seed=1).items()} == expected


def test_nothing_keeps_the_graph_of_a_step() -> None:
    gc.collect()
    # What a compiler of an earlier test keeps in this process is not of this step.
    before = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.grad_fn is not None]
    model = build()
    model.train()
    losses = model(**toy_batch(), mode='loss')
    total = model.parse_losses(losses)[0]
    graph = weakref.ref(losses['loss_kd_pixel'])
    total.backward()
    del losses, total
    gc.collect()
    assert graph() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.student.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.teacher.network.modules())
    held = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.grad_fn is not None]
    assert not {id(o) for o in held} - {id(o) for o in before}


def test_predict_and_tensor_are_the_student() -> None:
    model = build().eval()
    inputs = toy_batch()['inputs']
    with torch.no_grad():
        assert torch.equal(model(inputs, mode='tensor'), model.student(inputs, mode='tensor'))
        results = model(**toy_batch(), mode='predict')
        expected = model.student(**toy_batch(), mode='predict')
    assert torch.equal(results[0].pred_sem_seg.data, expected[0].pred_sem_seg.data)


def test_state_dict_is_the_plain_students_on_every_path() -> None:
    model, plain = build(), MODELS.build(toy_segmentor(4))
    assert list(get_state_dict(model)) == list(plain.state_dict())
    assert model.state_dict()._metadata.keys() == plain.state_dict()._metadata.keys()
    critic = copy.deepcopy(model.terms.state_dict())
    for load in (lambda s: model.load_state_dict(s, strict=True), lambda s: load_state_dict(model, s, strict=True)):
        weights = {k: v + 1 for k, v in plain.state_dict().items()}
        load(weights)
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(v, critic[k]) for k, v in model.terms.state_dict().items())
    with pytest.raises(RuntimeError, match='decode_head.conv_seg.bias'):
        model.load_state_dict({k: v for k, v in weights.items() if k != 'decode_head.conv_seg.bias'}, strict=True)
    with pytest.raises(RuntimeError, match='nonsense'):
        model.load_state_dict({**weights, 'nonsense.weight': torch.zeros(1)}, strict=True)
    inside = nn.ModuleDict({'module': model})
    assert list(inside.state_dict()) == ['module.' + k for k in plain.state_dict()]
    inside.load_state_dict(inside.state_dict(), strict=True)


def test_the_global_random_streams_are_the_plain_students() -> None:
    torch.manual_seed(3)
    plain = MODELS.build(toy_segmentor(4))
    plain.init_weights()
    expected, drawn = copy.deepcopy(plain.state_dict()), torch.rand(1)
    torch.manual_seed(3)
    model = build()
    model.init_weights()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.rand(1), drawn)


def test_weights_of_zero_are_plain_training() -> None:
    torch.manual_seed(3)
    plain = MODELS.build(toy_segmentor(4))
    step(plain)
    torch.manual_seed(3)
    terms = toy_terms()
    for term in terms.values():
        term['loss']['loss_weight'] = 0.0
    model = build(terms=terms)
    calls = []
    model.teacher.network.backbone.register_forward_hook(lambda *a: calls.append(1))
    losses = step(model)
    assert calls == []  # the teacher did not run
    assert all(float(v.detach()) == 0 for k, v in losses.items() if k.startswith('loss_kd_'))
    for (name, p), q in zip(plain.named_parameters(), model.student.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []  # DDP waits for none


def test_the_terms_do_not_change_the_students_own_random_draws() -> None:
    """Dropout of the student is the same with and without terms: its own loss is equal."""
    torch.manual_seed(3)
    plain = step(MODELS.build(toy_segmentor(4)))
    torch.manual_seed(3)
    distilled = step(build())
    assert torch.equal(plain['decode.loss_ce'], distilled['decode.loss_ce'])
    drawn = torch.rand(1)
    torch.manual_seed(3)
    step(MODELS.build(toy_segmentor(4)))
    assert torch.equal(torch.rand(1), drawn)


def test_attributes_of_the_student_are_reachable() -> None:
    model = build()
    assert model.decode_head is model.student.decode_head
    assert model.with_auxiliary_head
    with pytest.raises(AttributeError, match='nothing_of_that_name'):
        _ = model.nothing_of_that_name


def test_taps_of_auxiliary_heads_and_inputs() -> None:
    terms = dict(
        aux=dict(tap='auxiliary_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss')),
        input=dict(tap='in:decode_head.conv_seg', loss=dict(type='mmstructkd.PairwiseAffinityLoss')),
        levels=dict(tap=['backbone[1]', 'backbone[2]'], loss=dict(type='mmstructkd.PairwiseAffinityLoss')),
    )
    model = build(terms=terms)
    assert [level.student for level in model.terms['levels'].levels] == [(1, 8, 6, 8), (1, 16, 6, 8)]
    losses = step(model)
    assert losses['loss_kd_aux'] > 0
    one = build(terms=dict(one=dict(terms['levels'], tap='backbone[1]'), two=dict(terms['levels'], tap='backbone[2]')))
    one.load_state_dict(model.state_dict())
    one._teacher = model._teacher
    model.zero_grad()
    model.eval(), one.eval()
    batch = toy_batch()
    both, apart = model(**batch, mode='loss'), one(**batch, mode='loss')
    mean = (apart['loss_kd_one'] + apart['loss_kd_two']) / 2
    assert both['loss_kd_levels'].item() == pytest.approx(mean.item(), rel=1e-5)  # the mean over levels


def test_channels_last_and_other_sizes_equal() -> None:
    model = build().eval()
    batch = toy_batch(size=(40, 56))
    plain = model(**batch, mode='loss')
    model.to(memory_format=torch.channels_last)
    batch['inputs'] = batch['inputs'].contiguous(memory_format=torch.channels_last)
    last = model(**batch, mode='loss')
    for name in ('loss_kd_pixel', 'loss_kd_pairwise', 'loss_kd_feature'):
        assert last[name].item() == pytest.approx(plain[name].item(), rel=1e-4, abs=1e-7)


def test_a_teacher_of_another_stride_is_resized() -> None:
    teacher = toy_segmentor(8)
    teacher.backbone.update(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))
    model = build(teacher=dict(config=teacher, allow_random=True))
    level = model.terms['pixel'].levels[0]
    assert (level.student[2:], level.teacher[2:]) == ((6, 8), (3, 4))
    assert torch.isfinite(step(model)['loss_kd_pixel'])


def test_loss_weight_scales_the_term() -> None:
    terms = dict(pixel=toy_terms()['pixel'])
    one = build(terms=terms)
    terms['pixel']['loss']['loss_weight'] = 3.0
    three = build(terms=terms)
    three.load_state_dict(one.state_dict())
    three._teacher = one._teacher
    one.eval(), three.eval()
    a, b = (m(**toy_batch(), mode='loss')['loss_kd_pixel'].item() for m in (one, three))
    assert b == pytest.approx(3 * a, rel=1e-6)
    three.terms['pixel'].factor = 0.5
    c = three(**toy_batch(), mode='loss')['loss_kd_pixel'].item()
    assert c == pytest.approx(1.5 * a, rel=1e-6)


PIXEL = dict(type='mmstructkd.PixelwiseKLLoss')


@pytest.mark.parametrize(
    ('terms', 'error', 'message'),
    [
        ({}, ConfigError, '`terms` must be a dict of terms by name'),
        (dict(a=dict(loss=PIXEL)), ConfigError, "term 'a': `tap` must be given"),
        (dict(a=dict(tap='decode_head.conv_seg')), ConfigError, "term 'a': `loss` must be given"),
        (dict(a=dict(tap='x', loss=PIXEL, weigth=1)), ConfigError, "term 'a': .*got 'weigth'"),
        (dict(a=dict(tap='x', loss=PIXEL, conector={})), ConfigError, "Did you mean 'connector'"),
        ({'a-b': dict(tap='x', loss=PIXEL)}, ConfigError, 'plain identifier'),
        (dict(keys=dict(tap='x', loss=PIXEL)), ConfigError, 'Rename it'),
        (
            dict(a=dict(tap='decode_head.conv_sg', loss=PIXEL)),
            TapError,
            "term 'a': `student` must name a module of EncoderDecoder, got 'decode_head.conv_sg'. "
            "Did you mean 'decode_head.conv_seg'",
        ),
        (
            dict(a=dict(tap=dict(student='decode_head.conv_seg', teacher='decode_head.conv_sg'), loss=PIXEL)),
            TapError,
            "term 'a': `teacher` must name",
        ),
        (dict(a=dict(tap=dict(student='x'), loss=PIXEL)), ConfigError, "the keys 'student' and 'teacher'"),
        (dict(a=dict(tap='backbone', loss=PIXEL)), TapError, r"must be a tensor, got tuple. Pick one: 'backbone\[0\]'"),
        (dict(a=dict(tap='decode_head.dropout.x', loss=PIXEL)), TapError, 'must name a module'),
        (dict(a=dict(tap='decode_head.loss_decode', loss=PIXEL)), TapError, 'must name a module that runs'),
        (
            dict(a=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKlLoss'))),
            ConfigError,
            "got 'mmstructkd.PixelwiseKlLoss'. Did you mean 'PixelwiseKLLoss'",
        ),
        (
            dict(a=dict(tap='decode_head.conv_seg', loss=dict(PIXEL, loss_weight=-1.0))),
            ConfigError,
            "term 'a'.*`loss_weight` must be a finite number of at least 0, got -1.0",
        ),
        (dict(a=dict(tap='decode_head.conv_seg', loss=dict(PIXEL, loss_weight=float('inf')))), ConfigError, 'got inf'),
        (dict(a=dict(tap='decode_head.conv_seg', loss=dict(PIXEL, temprature=2))), ConfigError, 'temprature'),
        (dict(a=dict(tap='decode_head.conv_seg', loss=dict(type='mmseg.CrossEntropyLoss'))), ConfigError, 'labels'),
        (
            dict(a=dict(tap='decode_head.conv_seg', loss=PIXEL, connector=dict(type='mmstructkd.ConvConector'))),
            ConfigError,
            "term 'a': `connector` must name a registered.*got 'mmstructkd.ConvConector'. Did you mean 'ConvConnector'",
        ),
        (
            dict(a=dict(tap=dict(student=['backbone[1]', 'backbone[2]'], teacher='backbone[2]'), loss=PIXEL)),
            TapError,
            'as many tensors of the student as of the teacher, got 2 and 1',
        ),
    ],
)
def test_bad_terms_fail_at_build(terms: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(terms=terms)


def test_a_teacher_of_other_classes_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match="term 'a'.*num_classes=5 for the teacher and 9 for the student"):
        build(
            student=toy_segmentor(4, num_classes=9),
            teacher=dict(config=toy_segmentor(8, num_classes=5), allow_random=True),
            terms=dict(a=dict(tap='decode_head.conv_seg', loss=PIXEL)),
        )


def test_shapes_a_loss_cannot_take_fail_at_build() -> None:
    terms = dict(
        a=dict(
            tap='decode_head.convs',
            loss=dict(type='mmstructkd.HolisticLoss', critic=dict(base_channels=4)),
        )
    )
    with pytest.raises(ShapeError, match="term 'a'"):
        build(terms=terms)


def test_student_and_teacher_arguments() -> None:
    with pytest.raises(ConfigError, match='`teacher` must be a dict'):
        build(teacher='pspnet.py')
    with pytest.raises(ConfigError, match='`teacher` cannot be built.*chekpoint'):
        build(teacher=dict(config=toy_segmentor(8), chekpoint='x.pth'))
    with pytest.raises(ConfigError, match='`student` must be a config or an mmengine model, got Linear'):
        build(student=nn.Linear(1, 1))
    model = build(student=MODELS.build(toy_segmentor(4)))
    assert isinstance(model, StructuredDistiller)


def test_two_terms_of_one_name() -> None:
    terms = toy_terms()
    terms['holistic_critic'] = terms.pop('pixel')
    with pytest.raises(ConfigError, match="got 'loss_kd_holistic_critic', which term 'holistic' logs as well"):
        build(terms=terms)
    with pytest.raises(ConfigError, match='must be a dict of terms by name'):
        build(terms=[dict(name='a'), dict(name='a')])
    with pytest.raises(SyntaxError, match='keyword argument repeated: pixel'):
        Config.fromstring('terms = dict(pixel=dict(tap="a"), pixel=dict(tap="b"))', '.py')
