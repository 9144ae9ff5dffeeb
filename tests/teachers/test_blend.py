"""A student that teaches itself to be linear between images: values against loops, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, TapError
from mmstructkd.functional.pixelwise_kl import pixelwise_kl_loss
from mmstructkd.streams import MixedStream
from mmstructkd.structures import Targets
from mmstructkd.testing import toy_batch
from tests.reference import blending as reference
from tests.teachers.kinds import ATTENTION, KL, SCORES, SELF, build, frozen

MIXED = dict(mixed=dict(type='mmstructkd.MixedStream', alpha=0.4, norm='update'))
BLEND = dict(type='mmstructkd.BlendTeacher', stream='mixed')
ON_MIXED = dict(SCORES['kd'], on='mixed')


def listened(model: Any, module: str, step: int = 0) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The losses of a step, and what a module of the student gave in it, pass by pass."""
    seen: list[Tensor] = []
    model.step = step
    handle = model.student.get_submodule(module).register_forward_hook(lambda _m, _i, output: seen.append(output))
    losses = model(**toy_batch(), mode='loss')
    handle.remove()
    return losses, seen


@pytest.mark.parametrize('step', [0, 5])
def test_the_target_is_the_blend_of_the_students_own_scores(step: int) -> None:
    model = build('blend')
    losses, (plain, mixed) = listened(model, 'decode_head.conv_seg', step)
    batch = toy_batch()
    made = MixedStream(alpha=0.4).make(batch['inputs'], batch['data_samples'], Targets(), {}, step)
    share, partners = made.blend.share, made.blend.partners.tolist()
    want = reference.blend(plain.detach(), partners, [share] * len(plain))
    torch.testing.assert_close(losses['loss_kd_kd_mixed'], pixelwise_kl_loss(mixed, want))
    images = reference.blend(batch['inputs'], partners, [share] * len(plain))
    torch.testing.assert_close(made.inputs, images)


def test_levels_against_the_loop() -> None:
    model = build(
        'blend', terms=dict(maps=dict(on='mixed', tap='backbone.layer2', loss=dict(type='mmstructkd.FeatureMSELoss')))
    )
    losses, (plain, mixed) = listened(model, 'backbone.layer2')
    batch = toy_batch()
    made = model.streams['mixed'].make(batch['inputs'], batch['data_samples'], Targets(), {}, 0)
    shares = [made.blend.share] * len(plain)
    want = reference.blended_mse(mixed, plain.detach(), made.blend.partners.tolist(), shares)
    torch.testing.assert_close(losses['loss_kd_maps_mixed'], want)


def test_the_gradient_comes_from_the_blend_alone() -> None:
    """The target is detached: the labelled pass has the gradient of the task and no other."""
    model = build('blend', task_weight=0.0)
    losses, (plain, mixed) = listened(model, 'decode_head.conv_seg')
    for tensor in (plain, mixed):
        tensor.retain_grad()
    total, _ = model.parse_losses(losses)
    total.backward()
    assert not plain.grad.any()
    assert mixed.grad.any()


def test_a_member_among_others_and_at_its_own_pace() -> None:
    """Beside a self-teacher and a frozen one, with blends asked for at each second step."""
    teachers = dict(own=SELF, big=frozen(8), blended=dict(BLEND, every=2))
    taps = {name: dict(student='decode_head.conv_seg', teacher=f'{name}.decode_head.conv_seg') for name in teachers}
    terms = dict(
        own=dict(tap=taps['own'], loss=KL),
        both=dict(on=['labelled', 'mixed'], tap=taps['big'], loss=KL),
        blended=dict(on='mixed', tap=taps['blended'], loss=KL),
    )
    alone = build('blend', terms=dict(blended=ON_MIXED))
    model = build('group', teachers=teachers, terms=terms, streams=MIXED)
    model.load_state_dict(alone.state_dict())
    values = []
    for one in (alone, model):
        torch.manual_seed(1)
        values.append(one(**toy_batch(), mode='loss')['loss_kd_blended_mixed'])
    torch.testing.assert_close(*values)
    assert model.teacher.interval_factor(1, model.terms['blended'].teacher_taps) == 0
    copy.deepcopy(model)(**toy_batch(), mode='loss')


@pytest.mark.parametrize('on', ['labelled', ['labelled', 'mixed']])
def test_a_term_on_other_batches_is_refused(on: Any) -> None:
    with pytest.raises(ConfigError, match="`on` must be 'mixed' with a BlendTeacher"):
        build('blend', terms=dict(kd=dict(ON_MIXED, on=on)))


@pytest.mark.parametrize(
    'stream',
    [dict(type='mmstructkd.DataStream'), dict(type='mmstructkd.ScaledStream', scale=0.5)],
)
def test_a_stream_without_blends_is_refused(stream: dict) -> None:
    with pytest.raises(ConfigError, match='`stream` must name a stream of blends, got .mixed.'):
        build('blend', streams=dict(mixed=stream))


@pytest.mark.parametrize('stream', ['', 3, None, 'a.b'])
def test_a_name_is_asked_for(stream: Any) -> None:
    with pytest.raises(ConfigError, match='`stream` must be the name of a stream'):
        build('blend', teacher=dict(BLEND, stream=stream))


def test_a_stream_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match='BlendTeacher: `stream` must name a stream of the distiller, got .mixd.'):
        build('blend', teacher=dict(BLEND, stream='mixd'))


def test_a_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match='It is the student'):
        build('blend', teacher=dict(BLEND, cache=dict(folder='nowhere')))


def test_taps_that_name_nothing_and_losses_that_need_labels() -> None:
    with pytest.raises(TapError, match='conv_sg'):
        build(
            'blend',
            terms=dict(kd=dict(ON_MIXED, tap=dict(student='decode_head.conv_seg', teacher='decode_head.conv_sg'))),
        )
    with pytest.raises(ConfigError, match='must name a stream with labels'):
        build('blend', terms=dict(kd=dict(ON_MIXED, loss=dict(type='mmstructkd.DecoupledKLLoss'))))


def test_a_blend_of_silence_costs_no_stream() -> None:
    """Where no term counts, the student runs once."""
    model = build('blend', terms=dict(maps=dict(on='mixed', tap='backbone[*]', loss=ATTENTION)))
    model.terms['maps'].factor = 0.0
    losses, passes = listened(model, 'decode_head.conv_seg')
    assert len(passes) == 1
    assert losses['loss_kd_maps_mixed'] == 0
