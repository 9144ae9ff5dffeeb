"""Turned cells against upright ones: loops, masks, a stream that holds both, and a run through terms."""

from __future__ import annotations

import logging

import pytest
import torch
from mmengine.logging import MMLogger

from mmstructkd import functional as F
from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.losses import CrossViewSimilarityLoss
from mmstructkd.registry import MODELS
from mmstructkd.streams import TurnedStream
from mmstructkd.structures import Targets
from mmstructkd.testing import toy_batch, toy_distiller
from tests import test_golden_teachers as published

golden = published.golden
#: What undoes each turn, on the last two axes.
BACK = {
    'none': lambda x: x,
    'half': lambda x: x.flip(-1, -2),
    'flip': lambda x: x.flip(-1),
    'flip_half': lambda x: x.flip(-2),
}


def loops(student, teacher, views, temperature, keep, valid=None):
    """The loss on maps whose positions are the cells, with sums and sorts written out."""
    count = len(student) // len(views)
    places = [(b, y, x) for b in range(count) for y in range(student.shape[2]) for x in range(student.shape[3])]
    order = ['none', *(view for view in views if view != 'none')]

    def vector(maps, view, place):
        b, y, x = place
        return BACK[view](maps[views.index(view) * count + b])[:, y, x]

    def counts(place):
        return valid is None or all(bool(BACK[v](valid[views.index(v) * count + place[0]])[place[1:]]) for v in views)

    def cosine(a, b):
        return (a / a.norm()) @ (b / b.norm())

    rows = []
    for own, place in enumerate(places):
        for view in order[1:]:
            if counts(place):
                near = [
                    [
                        cosine(vector(m, view, place), vector(m, 'none', other)) if counts(other) else m.new_zeros(())
                        for other in places
                    ]
                    for m in (student, teacher)
                ]
                right = near[1][own]
                rank = sum(
                    bool(value > right) or (bool(value == right) and other < own)
                    for other, value in enumerate(near[1])
                    if counts(places[other])
                )
                rows.append((rank, len(rows), torch.stack(near[0]), torch.stack(near[1])))
    wrong = sum(rank > 0 for rank, *_ in rows)
    kept = sorted(rows, key=lambda row: row[:2])[: len(rows) - wrong + int(wrong * keep)]
    total = 0.0
    for _, _, near_s, near_t in kept:
        log_s, log_t = (torch.log_softmax(near / temperature, 0) for near in (near_s, near_t))
        total = total + (log_t.exp() * (log_t - log_s)).sum()
    return temperature**2 * total / max(len(kept), 1)


@pytest.mark.parametrize('views', [('none', 'half'), ('flip', 'none', 'flip_half')])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('keep', [0.0, 0.6, 1.0])
def test_equals_loops(views, masked, keep):
    torch.manual_seed(0)
    student = torch.randn(2 * len(views), 3, 2, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2 * len(views), 5, 2, 3, dtype=torch.float64)
    # The views of an image resemble each other, so that some rows are right.
    upright = teacher[:2].clone()
    for place, view in enumerate(views):
        teacher[2 * place : 2 * place + 2] = BACK[view](upright) + 0.7 * teacher[2 * place : 2 * place + 2]
    valid = torch.rand(2 * len(views), 2, 3) > 0.15 if masked else None
    got = CrossViewSimilarityLoss(2.0, temperature=0.4, keep=keep)(student, teacher, Targets(views=views, valid=valid))
    want = 2 * loops(student, teacher, views, 0.4, keep, valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


@published.case_names('sskd_student*')
def test_published_embeddings_through_the_registered_loss(name):
    """Images as cells; the rows are the teacher's choice by rank, with ties in the order of the rows."""
    case = golden.load(name)
    _, embeddings = golden.learner(case)
    embeddings_t = case['teacher'][1]
    views = ('none', 'quarter', 'half', 'three_quarters')
    maps = [e.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)[..., None, None] for e in (embeddings, embeddings_t)]
    got = CrossViewSimilarityLoss()(*maps, Targets(views=views))
    want = 10 * F.cross_view_similarity_loss(embeddings, embeddings_t)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, embeddings), torch.autograd.grad(want, embeddings))


@pytest.mark.parametrize('turns', [('none', 'half'), ('flip', 'none'), ('none', 'half', 'flip', 'flip_half')])
def test_a_feature_that_turns_along_is_alike_everywhere(turns):
    """A student that sees the turned image as the upright one, turned, is told so whatever it sees."""
    torch.manual_seed(0)
    batch = toy_batch(2, (12, 16))
    made = TurnedStream(turns).make(batch['inputs'], batch['data_samples'], Targets(), {}, 0)
    assert made.targets.views == turns
    assert len(made.inputs) == 2 * len(turns)
    place = 2 * turns.index('none')
    assert torch.equal(made.inputs[place : place + 2], batch['inputs'])
    loss = CrossViewSimilarityLoss(grid=3)
    assert loss(made.inputs, made.inputs, made.targets) < 1e-6
    mixed = made.inputs.roll(1, 0)
    assert loss(mixed, made.inputs, made.targets) > 1e-3
    assert TurnedStream(turns=[t for t in turns if t != 'none']).views == ()


def test_what_does_not_count_changes_nothing():
    torch.manual_seed(0)
    views = ('none', 'half')
    student, teacher = torch.randn(4, 3, 8, 8), torch.randn(4, 4, 8, 8)
    upright = torch.rand(2, 8, 8) > 0.5
    upright[:, :4] = False  # whole cells, and parts of others
    valid = torch.cat([upright, upright.flip(-1, -2)])
    loss = CrossViewSimilarityLoss(grid=4)
    want = loss(student, teacher, Targets(views=views, valid=valid))
    spoiled = [torch.where(valid[:, None], z, float('nan')) for z in (student, teacher)]
    torch.testing.assert_close(loss(*spoiled, Targets(views=views, valid=valid)), want)
    nothing = Targets(views=views, valid=torch.zeros(4, 8, 8, dtype=torch.bool))
    assert loss(student.requires_grad_(), teacher, nothing) == 0


def distiller(**changes):
    terms = dict(
        kd=dict(on='views', tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss')),
        similarity=dict(on='views', tap='backbone[3]', loss=dict(type='mmstructkd.CrossViewSimilarityLoss')),
    )
    terms['similarity'].update(changes)
    streams = dict(
        views=dict(type='mmstructkd.TurnedStream', turns=('none', 'half')),
        turned=dict(type='mmstructkd.TurnedStream', turns=('half',)),
    )
    return MODELS.build(toy_distiller(terms=terms, streams=streams)).train()


def test_a_term_sees_both_views_in_one_stream(caplog):
    torch.manual_seed(0)
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            model = distiller()
            assert 'compares turned copies' not in caplog.text
            losses = model(**toy_batch(), mode='loss')
            assert losses['loss_kd_similarity_views'] > 0
            losses['loss_kd_similarity_views'].backward()
            assert model.student.backbone.layer1[0].conv1.weight.grad.any()
            for on in ('labelled', 'turned'):
                caplog.clear()
                distiller(on=on)
                assert f"compares turned copies with the upright batch, and '{on}' does not hold both" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_wrong_settings_and_copies():
    for keep in (-0.1, 1.5, float('nan'), True):
        with pytest.raises(ConfigError, match='CrossViewSimilarityLoss: `keep` must be'):
            CrossViewSimilarityLoss(keep=keep)
    with pytest.raises(ConfigError, match="`turns` must have another turn beside 'none'"):
        TurnedStream(turns=['none'])
    with pytest.raises(ShapeError, match='must have a copy for each'):
        CrossViewSimilarityLoss()(torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4), Targets(views=('none', 'half')))
    with pytest.raises(ShapeError, match='must share'):
        CrossViewSimilarityLoss()(torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 5), Targets(views=('none', 'half')))
