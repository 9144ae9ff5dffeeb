"""The sweep over the zoos: which configs, what it finds out about one, what it keeps and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mmengine.config import Config

from mmstructkd.testing import toy_config, toy_detector, toy_segmentor


@pytest.fixture(scope='module')
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('sweep_zoo')


def plain_config(path: Path, model: dict, task: str = 'seg') -> str:
    toy_config(model, path.parent / 'run', task=task).dump(path)
    return str(path)


# --- which configs -------------------------------------------------------------------------------------------


def test_light_configs_come_first(tool: ModuleType) -> None:
    names = [
        'pspnet_r101-d8_4xb2-40k_cityscapes-512x1024',
        'pspnet_r18-d8_4xb2-80k_cityscapes-512x1024',
        'pspnet_r50-d8_4xb2-40k_cityscapes-512x1024',
    ]
    assert sorted(names, key=tool.weight_of) == [names[1], names[2], names[0]]
    for light, heavy in (
        ('pidnet-s_2xb6-120k_1024x1024-cityscapes', 'pidnet-l_2xb6-120k_1024x1024-cityscapes'),
        ('mask-rcnn_swin-t-p4-w7_fpn_1x_coco', 'mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco'),
        ('segformer_mit-b0_8xb2-160k_ade20k-512x512', 'segformer_mit-b5_8xb2-160k_ade20k-512x512'),
        ('retinanet_r50_fpn_1x_coco', 'retinanet_x101-32x4d_fpn_1x_coco'),
    ):
        assert tool.weight_of(light) < tool.weight_of(heavy)


def test_it_takes_configs_that_train_something(tool: ModuleType) -> None:
    ((folder,),) = tool.choose('mmseg', 1, ['erfnet'])
    assert folder == 'mmseg::erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1024.py'
    (several,) = tool.choose('mmdet', 2, ['detr'])
    assert several[0] == 'mmdet::detr/detr_r18_8xb2-500e_coco.py'
    assert len(several) == 2
    # a folder of dataset settings alone
    assert tool.choose('mmdet', 1, ['common']) == [['mmdet::common/']]


def test_what_is_left_to_run(tool: ModuleType) -> None:
    done = {
        'good': dict(plain='ok', distilled='ok'),
        'bad': dict(plain='ok', distilled='TapError: x'),
        'poor': dict(plain='ImportError: x'),
    }
    names = ['good', 'bad', 'poor', 'new']
    assert tool.left(names, done, 'none') == ['new']
    assert tool.left(names, done, 'failed') == ['bad', 'new']
    assert tool.left(names, done, 'plain') == ['bad', 'poor', 'new']
    assert tool.left(names, done, 'all') == names


# --- one config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('model', 'task', 'tap'),
    [
        (toy_segmentor(2), 'seg', 'decode_head.conv_seg'),
        (toy_detector('fcos', 2), 'det', 'neck[*]'),
        (toy_detector('mask_rcnn', 2), 'det', 'neck[*]'),
    ],
)
def test_one_config(tool: ModuleType, tmp_path: Path, model: dict, task: str, tap: str) -> None:
    report = tool.run_one(plain_config(tmp_path / 'plain.py', model, task), [])
    assert (report['plain'], report['distilled'], report['tap']) == ('ok', 'ok', tap)
    assert report['value'] > 0
    assert tool.works(report)
    json.dumps(report)
    only = tool.run_one(plain_config(tmp_path / 'plain.py', model, task), [], plain_only=True)
    assert only['plain'] == 'ok'
    assert 'distilled' not in only


def test_taps_of_ones_own(tool: ModuleType, tmp_path: Path) -> None:
    path = plain_config(tmp_path / 'plain.py', toy_segmentor(2))
    assert tool.run_one(path, ['backbone.layer2'])['tap'] == 'backbone.layer2'
    report = tool.run_one(path, ['backbone.layer9'])
    assert report['plain'] == 'ok'
    assert report['distilled'].startswith("TapError: term 'probe': `student` must name a module of EncoderDecoder")
    assert not tool.works(report)


def test_a_network_that_does_not_train(tool: ModuleType, tmp_path: Path) -> None:
    broken = toy_segmentor(2)
    broken.decode_head.in_channels = 3
    report = tool.run_one(plain_config(tmp_path / 'plain.py', broken), [])
    assert report['plain'].startswith('RuntimeError: ')
    assert '.py:' in report['plain']  # where
    assert 'distilled' not in report
    assert tool.outcome(report).startswith('not tried: RuntimeError')
    assert tool.run_one('mmdet::common/', [])['plain'].startswith('FileNotFoundError: no config of this folder')


def test_a_process_of_its_own_has_limits(tool: ModuleType, tmp_path: Path) -> None:
    path = plain_config(tmp_path / 'plain.py', toy_segmentor(2))
    assert tool.run_apart(path, [], 0.5, 4)['plain'] == 'no result after 0.5 s'
    starved = tool.run_apart(path, [], 100, 0.05)
    assert starved['plain'] != 'ok'
    assert starved['seconds'] < 100


# --- all of it -----------------------------------------------------------------------------------------------


def test_results_are_kept_and_written(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run_apart(reference: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        ran.append(reference)
        if 'broken' in reference:
            return dict(config=reference, plain='ValueError: a | b', seconds=1.0)
        distilled = 'TapError: no' if 'bad' in reference else 'ok'
        return dict(
            config=reference, plain='ok', distilled=distilled, tap='neck[*]', size=[64, 96], model='X', seconds=2.0
        )

    monkeypatch.setattr(tool, 'run_apart', run_apart)
    results, table = tmp_path / 'a' / 'results.json', tmp_path / 'zoo.md'
    arguments = ['good.py', 'bad.py', 'broken.py', '--results', str(results), '--table', str(table)]
    assert tool.main(arguments) == 1
    assert sorted(ran) == ['bad.py', 'broken.py', 'good.py']
    assert set(tool.read_results(results)) == set(ran)
    text = table.read_text()
    assert '| `good.py` | X | 64x96 | `neck[*]` | ok |' in text
    assert '| `bad.py` | X | 64x96 | `neck[*]` | TapError: no |' in text
    assert '| `broken.py` | ValueError: a \\| b |' in text
    assert '| own | 3 | 2 | 1 |' in text
    assert text.startswith('# One step of each zoo')
    assert tool.main(arguments) == 1
    assert len(ran) == 3  # nothing again
    monkeypatch.setattr(tool, 'run_apart', lambda reference, *a, **k: dict(plain='ok', distilled='ok', seconds=1.0))
    assert tool.main([*arguments, '--rerun', 'failed']) == 0


def test_another_config_of_the_folder_is_tried(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run_apart(reference: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        ran.append(reference)
        return dict(plain='ok' if reference == 'second' else 'no', distilled='ok', seconds=0.0)

    monkeypatch.setattr(tool, 'run_apart', run_apart)
    monkeypatch.setattr(tool, 'choose', lambda scope, most, folders: [['first', 'second', 'third'][:most]])
    tool.main(['--scope', 'mmseg', '--results', str(tmp_path / 'r.json')])
    assert ran == ['first', 'second']
    assert tool.summary(tool.read_results(tmp_path / 'r.json')) == [('own', 2, 1, 1)]


def test_the_configs_of_a_zoo_can_be_read(tool: ModuleType) -> None:
    """Where the zoos lie, whichever distribution they came with."""
    for scope in tool.SCOPES:
        assert (tool.config_root(scope) / '_base_').is_dir()
    cfg = tool._prepared('mmseg::erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1024.py')
    assert isinstance(cfg, Config)
