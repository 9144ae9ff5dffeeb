"""Several teachers: their mean by confidence, a head for each, and one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

from mmstructkd.registry import MODELS
from mmstructkd.taps import Tap
from mmstructkd.testing import toy_batch, toy_config, toy_distiller, toy_segmentor
from tests.teachers.kinds import KL, SCORES, frozen


def several(terms: dict, **teachers: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = toy_distiller(teachers=teachers, terms=terms)
    model.pop('teacher')
    return MODELS.build(model).train()


def how_sure(scores: list[float], by: str) -> float:
    """Of one teacher at one pixel, by the definition."""
    total = sum(torch.tensor(z).exp().item() for z in scores)
    p = sorted((torch.tensor(z).exp().item() / total for z in scores), reverse=True)
    if by == 'maximum':
        return p[0]
    if by == 'margin':
        return p[0] - p[1]
    return 1 + sum(q * torch.tensor(q).log().item() for q in p) / torch.tensor(float(len(p))).log().item()


@pytest.mark.parametrize(('by', 'sharpness'), [('maximum', 1.0), ('margin', 2.0), ('entropy', 1.0)])
def test_each_pixel_is_weighed_by_how_sure_each_teacher_is(by: str, sharpness: float) -> None:
    """Through the distiller: the mean, the loss against it, and the gradient of the student's scores."""
    weights = dict(big=0.7, wide=0.3)
    mean = dict(type='mmstructkd.TeacherMean', of=weights, confidence=by, sharpness=sharpness)
    tap = dict(student='decode_head.conv_seg', teacher='mean.decode_head.conv_seg')
    model = several(dict(kd=dict(tap=tap, loss=KL)), big=frozen(8), wide=frozen(6), mean=mean)
    batch = toy_batch()
    taps = [Tap.parse(f'{name}.decode_head.conv_seg', 'test') for name in ('big', 'wide', 'mean')]
    shown = model.teacher.observe(batch['inputs'], batch['data_samples'], taps)
    big, wide, fused = (shown[tap][0] for tap in taps)
    for b, y, x in ((0, 0, 0), (0, 3, 5), (1, 2, 7), (1, 5, 1)):
        voices = {'big': big[b, :, y, x].tolist(), 'wide': wide[b, :, y, x].tolist()}
        parts = {name: weights[name] * how_sure(z, by) ** sharpness for name, z in voices.items()}
        whole = sum(parts.values())
        want = [sum(parts[n] / whole * voices[n][c] for n in voices) for c in range(big.shape[1])]
        torch.testing.assert_close(fused[b, :, y, x], torch.tensor(want), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(fused, 0.7 * big + 0.3 * wide)
    torch.manual_seed(3)
    _, seen = model.observe(batch['inputs'], batch['data_samples'], list(model.terms.values()))
    (scores,) = seen.student[Tap.parse('decode_head.conv_seg', 'test')]
    value = model.score(seen)['kd']['loss_kd_kd']
    (got,) = torch.autograd.grad(value, scores)
    # The gradient of a mean divergence: the difference of the probabilities over the number of pixels.
    pixels = scores.numel() / scores.shape[1]
    want = (scores.detach().softmax(1) - fused.softmax(1)) / pixels
    torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-3)


def test_each_teacher_has_a_head_of_its_own() -> None:
    """SimReg's form: what one head learns does not depend on the other teacher, and no parameter is shared."""

    def term(name: str, weight: float) -> dict:
        return dict(
            tap=dict(student='backbone[3]', teacher=f'{name}.backbone[3]'),
            connector=dict(type='mmstructkd.DeepProjectorConnector'),
            loss=dict(type='mmstructkd.StandardizedMSELoss', loss_weight=weight),
        )

    found = []
    for weight in (1.0, 7.0):
        model = several(dict(a=term('a', 1.0), b=term('b', weight)), a=frozen(8), b=frozen(6))
        heads = [dict(model.terms[name].connectors.named_parameters()) for name in 'ab']
        assert not {id(p) for p in heads[0].values()} & {id(p) for p in heads[1].values()}
        torch.manual_seed(3)
        model.parse_losses(model(**toy_batch(), mode='loss'))[0].backward()
        found.append([{name: p.grad.clone() for name, p in head.items()} for head in heads])
    for name, grad in found[0][0].items():
        torch.testing.assert_close(grad, found[1][0][name], rtol=1e-6, atol=0)
    largest = max(grad.abs().max() for grad in found[0][1].values())
    for name, grad in found[0][1].items():
        torch.testing.assert_close(7 * grad, found[1][1][name], rtol=1e-3, atol=1e-5 * float(largest))


def test_an_assistant_between_teacher_and_student(tmp_path: Path) -> None:
    """Two runs: what the first one saves is a plain network, which the second one takes as its teacher."""
    first = toy_distiller(student=toy_segmentor(6), teacher=frozen(8), terms=SCORES)
    runner = Runner.from_cfg(toy_config(first, tmp_path / 'assistant', max_iters=2))
    runner.train()
    assistant = {name: value.clone() for name, value in runner.model.state_dict().items()}
    teacher = dict(config=toy_segmentor(6), checkpoint=str(tmp_path / 'assistant' / 'iter_2.pth'))
    second = toy_distiller(teacher=teacher, terms=SCORES)
    runner = Runner.from_cfg(toy_config(second, tmp_path / 'student', max_iters=2))
    runner.train()
    state = runner.model.teacher.network.state_dict()
    assert state.keys() == assistant.keys()
    assert all(torch.equal(value, assistant[name]) for name, value in state.items())
