"""Export and check of depth estimators and of each kind of detector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_depth_estimator, toy_detector, toy_distiller

FEATURE = dict(type='mmstructkd.ChannelwiseKLLoss', temperature=1.0)
REGION = dict(tap='roi_head.bbox_head.fc_cls', loss=dict(type='mmstructkd.PixelwiseKLLoss'))
KINDS = ('depth', 'fcos', 'retinanet', 'faster_rcnn')


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, str]:
    """Kind, config and checkpoint of a distilled run that was never trained."""
    kind = request.param
    depth = kind == 'depth'
    student, teacher = (toy_depth_estimator(w) if depth else toy_detector(kind, w) for w in (2, 4))
    terms = dict(feature=dict(tap='backbone[3]' if depth else 'neck[:3]', loss=FEATURE))
    if kind == 'faster_rcnn':
        terms['region'] = REGION
    model = toy_distiller(student=student, teacher=dict(config=teacher, allow_random=True), terms=terms)
    cfg = toy_config(model, tmp_path / 'work', task='depth' if depth else 'det')
    cfg.test_dataloader = cfg.val_dataloader
    cfg.dump(tmp_path / 'run.py')
    torch.save({'state_dict': MODELS.build(model).state_dict(), 'meta': {}}, tmp_path / 'run.pth')
    return kind, str(tmp_path / 'run.py'), str(tmp_path / 'run.pth')


def test_export(load_tool: Callable[[str], ModuleType], run: tuple[str, str, str], tmp_path: Path) -> None:
    """It verifies itself: every key, every bit, by mmseg's and mmdet's own API."""
    kind, config, checkpoint = run
    arguments = [config, checkpoint, '--size', '64', '96', '--out', str(tmp_path / 'student.pth')]
    if kind == 'depth':
        arguments += ['--onnx', str(tmp_path / 'student.onnx')]
    assert load_tool('export_student').main(arguments) == 0
    assert (tmp_path / 'student.pth').is_file()
    assert (tmp_path / 'student.onnx').is_file() == (kind == 'depth')


def test_check(
    load_tool: Callable[[str], ModuleType], run: tuple[str, str, str], capsys: pytest.CaptureFixture
) -> None:
    kind, config, _ = run
    # a real batch, and one of noise; in two steps, since time is measured in one only
    assert load_tool('check_config').main([config, '--runs', '0']) == 0
    assert load_tool('check_config').main([config, '--synthetic', '--size', '64', '96', '--runs', '1']) == 0
    text = capsys.readouterr().out
    assert text.count('All is well.') == 2
    assert 'teacher forward, to its deepest tap' in text
    wanted = {'depth': 'backbone[3]', 'faster_rcnn': 'roi_head.bbox_head.fc_cls'}.get(kind, 'neck[2]')
    assert wanted in text
