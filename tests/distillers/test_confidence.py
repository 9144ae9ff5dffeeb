"""Terms that count where the networks are sure: values against a loop, and taps that say nothing of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.testing import toy_batch, toy_depth_estimator, toy_distiller, toy_segmentor
from tests.teachers.kinds import KL, SCORES, build, frozen

SURE = dict(minimum=0.3, by='teacher')
CLASSES = 5


def model_with(confidence: Any) -> Any:
    torch.manual_seed(0)
    made = toy_distiller(teacher=frozen(8), terms=dict(kd=dict(SCORES['kd'], confidence=confidence)))
    return MODELS.build(made).train()


def scores(seed: int, size: tuple[int, int] = (4, 6), channels: int = CLASSES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, channels, *size, generator=generator)


def by_loop(student: Tensor, teacher: Tensor, valid: Tensor | None, minimum: float, by: str) -> tuple[float, int]:
    """Mean divergence over the positions that count, and how many these are."""
    total, number = 0.0, 0
    for b in range(student.shape[0]):
        for y in range(student.shape[2]):
            for x in range(student.shape[3]):
                sides = []
                for z in (teacher, student):
                    logits = z[b, :, y, x].tolist()
                    logits = [0.0, *logits] if len(logits) == 1 else logits
                    norm = sum(math.exp(one) for one in logits)
                    sides.append([math.exp(one) / norm for one in logits])
                sure = max(sides[0]) * (max(sides[1]) if by == 'both' else 1.0)
                if sure < minimum or (valid is not None and not valid[b, y, x]):
                    continue
                total += sum(p * math.log(p / q) for p, q in zip(*sides, strict=True))
                number += 1
    return total / max(number, 1), number


def term_of(confidence: dict | None, classes: int = CLASSES, **head: Any) -> Any:
    model = toy_segmentor(4, classes)
    big = toy_segmentor(8, classes)
    for one in (model, big):
        one.decode_head.update(head)
        one.auxiliary_head.update(head)
    teacher = dict(config=big, allow_random=True)
    terms = dict(kd=dict(SCORES['kd'], confidence=confidence))
    made = toy_distiller(student=model, teacher=teacher, terms=terms)
    return MODELS.build(made).terms['kd']


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize(('by', 'minimum'), [('teacher', 0.6), ('both', 0.3), ('both', 0.0), ('teacher', 1.0)])
def test_positions_below_do_not_count(by: str, minimum: float, masked: bool) -> None:
    term = term_of(dict(minimum=minimum, by=by))
    student, teacher = scores(0), scores(1)
    valid = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(2)) > 0.4 if masked else None
    targets = Targets(valid=valid, inside=valid, input_size=(4, 6))
    tap_s, tap_t = term.student_taps[0], term.teacher_taps[0]
    got = term({tap_s: [student]}, {tap_t: [teacher]}, targets)['loss_kd_kd']
    want, number = by_loop(student, teacher, valid, minimum, by)
    assert (number < 48) == (minimum > 0 or masked)
    assert got.item() == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_one_channel_is_the_score_of_a_sigmoid() -> None:
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0)
    term = term_of(dict(minimum=0.7, by='both'), 2, out_channels=1, threshold=0.5, loss_decode=loss)
    student, teacher = scores(0, channels=1), scores(1, channels=1)
    records = ({term.student_taps[0]: [student]}, {term.teacher_taps[0]: [teacher]})
    got = term(*records, Targets(input_size=(4, 6)))['loss_kd_kd']
    want, number = by_loop(student, teacher, None, 0.7, 'both')
    assert 0 < number < 48
    assert got.item() == pytest.approx(want, rel=1e-4)


def test_in_a_step_only_sure_positions_have_a_gradient() -> None:
    """On the labelled batch and on a stream: the threshold takes part of the map, and the loss is finite."""
    streams = dict(mixed=dict(type='mmstructkd.MixedStream'))
    plain = build('mixed', streams=streams)
    sure = build('mixed', terms=dict(kd=dict(SCORES['kd'], on=['labelled', 'mixed'], confidence=SURE)))
    none = build('mixed', terms=dict(kd=dict(SCORES['kd'], on=['labelled', 'mixed'], confidence=dict(minimum=1.0))))
    values = []
    for model in (plain, sure, none):
        model.load_state_dict(plain.state_dict())
        torch.manual_seed(3)
        losses = model(**toy_batch(), mode='loss')
        model.parse_losses(losses)[0].backward()
        values.append([losses[key].item() for key in ('loss_kd_kd', 'loss_kd_kd_mixed')])
    assert all(map(math.isfinite, values[1]))
    assert values[1] != values[0]
    assert values[2] == [0.0, 0.0]


@pytest.mark.parametrize('by', ['teacher', 'both'])
@pytest.mark.parametrize('tap', ['backbone[3]', 'decode_head.convs', 'in:decode_head.conv_seg', 'auxiliary_head.convs'])
def test_taps_that_are_no_scores_are_refused(tap: str, by: str) -> None:
    terms = dict(kd=dict(tap=tap, loss=dict(type='mmstructkd.FeatureMSELoss'), confidence=dict(by=by)))
    with pytest.raises(ConfigError, match="term 'kd': `confidence` must have scores of classes"):
        MODELS.build(toy_distiller(teacher=frozen(8), terms=terms))


def test_depth_is_refused() -> None:
    depth = toy_depth_estimator(4)
    loss = dict(type='mmstructkd.DepthRegressionLoss')
    terms = dict(kd=dict(tap='decode_head.to_depth', loss=loss, confidence=SURE))
    teacher = dict(config=toy_depth_estimator(8), allow_random=True)
    with pytest.raises(ConfigError, match='`confidence` must have scores of classes'):
        MODELS.build(toy_distiller(student=depth, teacher=teacher, terms=terms))


def test_scores_of_an_auxiliary_head_are_taken() -> None:
    terms = dict(kd=dict(tap='auxiliary_head.conv_seg', loss=KL, confidence=dict(minimum=0.0)))
    model = MODELS.build(toy_distiller(teacher=frozen(8), terms=terms)).train()
    assert model.terms['kd'].confidence.by == 'both'
    assert model(**toy_batch(), mode='loss')['loss_kd_kd'] > 0


def test_behind_a_connector_the_teacher_alone_says() -> None:
    connector = dict(type='mmstructkd.ConvConnector', out_channels=10)
    term = dict(tap=dict(student='decode_head.convs', teacher='decode_head.conv_seg'), loss=KL, connector=connector)
    with pytest.raises(ConfigError, match="must be by='teacher' behind a connector"):
        MODELS.build(toy_distiller(teacher=frozen(8), terms=dict(kd=dict(term, confidence=dict(by='both')))))
    model = MODELS.build(toy_distiller(teacher=frozen(8), terms=dict(kd=dict(term, confidence=SURE)))).train()
    assert model(**toy_batch(), mode='loss')['loss_kd_kd'].isfinite()


@pytest.mark.parametrize(
    ('confidence', 'message'),
    [
        (0.9, "`confidence` must be a dict with the keys 'minimum' and 'by'"),
        (dict(min=0.9), "`confidence` must be a dict with the keys 'minimum' and 'by'"),
        (dict(minimum=1.5), r'`minimum` must lie in \[0, 1\], got 1.5'),
        (dict(minimum=-0.1), '`minimum` must be'),
        (dict(minimum='high'), '`minimum` must be'),
        (dict(by='student'), '`by` must be'),
    ],
)
def test_what_is_no_confidence_is_refused(confidence: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"term 'kd'.*{message}"):
        model_with(confidence)
