"""The config in a checkpoint is for people without this package: it builds and predicts where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.datasets import CamVidDataset
from mmstructkd.datasets.scenes import CLASSES, OBJECT_CLASSES
from mmstructkd.distillers import student_config
from mmstructkd.distillers.plain_config import plain_config
from mmstructkd.testing import toy_config, toy_detector, toy_distiller, toy_terms
from tests.tools.conftest import load_tool  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
RESIZE = dict(type='Resize', scale_factor=1.0)


def plain_of(text: str) -> Config:
    """The plain config of one that is written here."""
    plain = plain_config(Config.fromstring(text, '.py'))
    return Config.fromstring(plain.pretty_text, '.py')


DISTILLER = """
default_scope = 'mmseg'
custom_imports = dict(imports=['mmstructkd', 'mmengine.dataset'])
trust_checkpoint = True
model = dict(type='mmstructkd.StructuredDistiller', student=dict(type='EncoderDecoder'), teacher=dict(), terms=dict())
"""


# --- what becomes of the parts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('part', 'expected'),
    [
        ("x = dict(type='mmstructkd.LoadScene', to_float32=True)", dict(type='LoadImageFromFile', to_float32=True)),
        (
            "x = [dict(type='mmstructkd.LoadScene'), dict(type='mmstructkd.LoadSceneAnnotations'), dict(type='P')]",
            [dict(type='LoadImageFromFile'), RESIZE, dict(type='P')],
        ),
        (
            "x = [dict(type='A'), dict(type='mmstructkd.FiniteAugmentation', views=2, transforms=[dict(type='B'), "
            "dict(type='mmstructkd.LoadScene')])]",
            [dict(type='A'), dict(type='B'), dict(type='LoadImageFromFile'), RESIZE],
        ),
        ("x = [dict(type='mmstructkd.BottomCrop', crop_size=(2, 2)), dict(type='P')]", [dict(type='P')]),
        (
            "x = dict(type='mmstructkd.AutocastOptimWrapper', dtype='bfloat16', clip_grad=dict(max_norm=1))",
            dict(type='OptimWrapper', clip_grad=dict(max_norm=1)),
        ),
        ("x = [dict(type='mmstructkd.FiniteLossHook'), dict(type='H')]", [dict(type='H')]),
        ("x = dict(pixel=dict(tap='a', loss=dict(type='mmstructkd.PixelwiseKLLoss')))", None),
        ("x = dict(pixel=dict(tap='a'))", dict(pixel=dict(tap='a'))),
        ("x = 'mmstructkd.SceneSegDataset'", None),
        ("x = dict(type='mmstructkd.NoSuchThing', a=1)", None),
    ],
)
def test_parts_of_this_package_become_what_they_are_made_from(part: str, expected: Any) -> None:
    assert plain_of(DISTILLER + part).get('x') == expected


def test_hooks_of_this_package_go_and_others_stay() -> None:
    cfg = plain_of(
        DISTILLER + "default_hooks = dict(a=dict(type='mmstructkd.FiniteLossHook'), b=dict(type='H'))\n"
        "custom_hooks = [dict(type='mmstructkd.FiniteLossHook'), dict(type='EMAHook')]"
    )
    assert cfg.default_hooks == dict(b=dict(type='H'))
    assert cfg.custom_hooks == [dict(type='EMAHook')]


def test_a_dataset_keeps_classes_arguments_and_pipeline() -> None:
    cfg = plain_of(
        DISTILLER
        + """
val_dataloader = dict(dataset=dict(type='RepeatDataset', times=2, dataset=dict(
    type='mmstructkd.CamVidDataset', data_root='data/camvid', data_prefix=dict(img_path='img/val'),
    pipeline=[dict(type='LoadImageFromFile')])))
val_cfg = dict(type='ValLoop')
"""
    )
    dataset = cfg.val_dataloader.dataset.dataset
    assert dataset.type == 'mmseg.BaseSegDataset'
    assert dataset.metainfo.classes == CamVidDataset.METAINFO['classes']
    assert dataset.data_prefix.img_path == 'img/val'
    assert dataset.pipeline == [dict(type='LoadImageFromFile')]
    assert cfg.val_cfg.type == 'ValLoop'  # its files are found by mmseg as well


def test_a_subset_of_classes_stays_one() -> None:
    cfg = plain_of(
        DISTILLER
        + "test_dataloader = dict(dataset=dict(type='mmstructkd.SceneSegDataset', num_scenes=3, split='test', "
        "metainfo=dict(classes=('sky',))))"
    )
    assert cfg.test_dataloader.dataset.metainfo.classes == ('sky',)
    assert set(cfg.test_dataloader.dataset) == {'type', 'metainfo'}


def test_training_on_data_that_only_this_package_gives_goes_as_a_whole(tmp_path: Path) -> None:
    cfg = toy_config(toy_distiller(), tmp_path, test_cfg=dict(type='TestLoop'), test_evaluator=dict(type='IoUMetric'))
    cfg.test_dataloader = cfg.val_dataloader
    cfg.optim_wrapper.base_constructor = 'LearningRateDecayOptimizerConstructor'
    plain = plain_config(cfg)
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_evaluator'):
        assert key in cfg
        assert key not in plain
    assert plain.test_dataloader.dataset.metainfo.classes == CLASSES
    steps = [step.type for step in plain.test_dataloader.dataset.pipeline]
    assert steps == ['LoadImageFromFile', 'Resize', 'PackSegInputs']
    assert (plain.test_cfg, plain.test_evaluator) == (cfg.test_cfg, cfg.test_evaluator)
    assert plain.default_hooks == cfg.default_hooks


def test_the_constructor_of_the_student_alone_comes_back() -> None:
    cfg = plain_of(
        DISTILLER
        + "optim_wrapper = dict(type='OptimWrapper', constructor='mmstructkd.DistillOptimWrapperConstructor', "
        "base_constructor='LearningRateDecayOptimizerConstructor', paramwise_cfg=dict(decay_rate=0.9))"
    )
    assert cfg.optim_wrapper.constructor == 'LearningRateDecayOptimizerConstructor'
    assert 'base_constructor' not in cfg.optim_wrapper
    cfg = plain_of(DISTILLER + "optim_wrapper = dict(constructor='mmstructkd.DistillOptimWrapperConstructor')")
    assert 'constructor' not in cfg.optim_wrapper


def test_imports_and_consent_of_this_package_go_and_others_stay() -> None:
    cfg = plain_of(DISTILLER)
    assert cfg.custom_imports.imports == ['mmengine.dataset']
    assert 'trust_checkpoint' not in cfg
    assert 'mmstructkd' not in cfg.pretty_text
    assert 'custom_imports' not in plain_of(DISTILLER.replace(", 'mmengine.dataset'", ''))


def test_a_student_made_of_this_package_keeps_it() -> None:
    cfg = Config.fromfile(CONFIGS / 'scenes' / 'depth_r18-w8_300_scenes-128x128.py')
    plain = plain_config(cfg)
    assert plain.model == cfg.model
    assert plain.test_dataloader == cfg.test_dataloader
    assert plain.custom_imports == cfg.custom_imports


def test_configs_with_objects_instead_of_names(tmp_path: Path) -> None:
    (tmp_path / 'new_style.py').write_text(
        'from mmengine.config import read_base\n'
        'from mmengine.optim import OptimWrapper\n'
        'from mmseg.models import EncoderDecoder\n'
        'from mmstructkd.datasets import LoadScene, LoadSceneAnnotations\n'
        'from mmstructkd.distillers import StructuredDistiller\n'
        "default_scope = 'mmseg'\n"
        'model = dict(type=StructuredDistiller, student=dict(type=EncoderDecoder), teacher=dict(), terms=dict())\n'
        'test_pipeline = [dict(type=LoadScene), dict(type=LoadSceneAnnotations)]\n'
        'optim_wrapper = dict(type=OptimWrapper)\n'
    )
    plain = plain_config(Config.fromfile(tmp_path / 'new_style.py', lazy_import=True))
    assert 'mmstructkd' not in plain.pretty_text
    assert plain.test_pipeline == [dict(type='LoadImageFromFile'), RESIZE]
    assert plain.model.type.endswith('EncoderDecoder')


def test_a_plain_config_and_the_given_one_stay_as_they_are(tmp_path: Path) -> None:
    cfg = toy_config(toy_distiller(), tmp_path)
    text = cfg.pretty_text
    plain_config(cfg)
    assert cfg.pretty_text == text
    cfg = Config(dict(model=dict(type='EncoderDecoder'), test_pipeline=[dict(type='LoadImageFromFile')]))
    assert plain_config(cfg).pretty_text == cfg.pretty_text


def test_a_distiller_of_ones_own_has_a_student_too() -> None:
    cfg = Config(dict(model=dict(type='mine.Distiller', student=dict(type='A'), teacher=dict(), terms=dict())))
    assert student_config(cfg).model == dict(type='A')
    cfg = Config(dict(model=dict(type='mine.Net', student=dict(type='A'))))
    assert student_config(cfg) is cfg
    assert student_config(Config(dict(x=1))).get('model') is None


@pytest.mark.parametrize(
    'config', sorted(CONFIGS.glob('*_small/*.py')) + sorted(CONFIGS.glob('scenes/*.py')), ids=lambda p: p.stem
)
def test_shipped_configs_name_the_package_only_where_their_model_does(config: Path) -> None:
    plain = plain_config(Config.fromfile(config))
    assert ('mmstructkd' in plain.pretty_text) == ('mmstructkd' in Config(dict(model=plain.model)).pretty_text)


# --- where this package is not installed ---------------------------------------------------------------------

WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'mmstructkd':
            raise ImportError(f'{name} is not installed here')

sys.meta_path.insert(0, Blocked())
import torch
from mmengine.config import Config
file, image, task = sys.argv[1:]
content = torch.load(file, weights_only=False)
texts = [content['meta']['cfg']]
if 'message_hub' in content:
    texts.append(content['message_hub']['runtime_info']['cfg'])
    assert len(set(texts)) == 1
cfg = Config.fromstring(texts[0], '.py')
if task == 'seg':
    from mmseg.apis import MMSegInferencer, inference_model, init_model
    model = init_model(cfg, file, device='cpu')
    assert inference_model(model, image).pred_sem_seg.shape == (48, 64)
    cfg = Config.fromstring(texts[0], '.py')
    cfg.visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
    inferencer = MMSegInferencer(cfg, file, device='cpu')
    assert inferencer(image)['predictions'].shape == (48, 64)
else:
    from mmdet.apis import inference_detector, init_detector
    model = init_detector(cfg, file, device='cpu')
    inference_detector(model, image)
missing = model.load_state_dict(content['state_dict'], strict=True)
assert not any(name.startswith('mmstructkd') for name in sys.modules)
print('CLASSES', ' '.join(model.dataset_meta['classes']), len(model.dataset_meta['palette']))
"""


def run_without(tmp_path: Path, file: Path, task: str) -> str:
    image = tmp_path / 'image.png'
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT, str(file), str(image), task],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        # mmengine of the openmmlab line leaves it to torch, which from 2.6 on refuses every message hub.
        env={**os.environ, 'PYTHONPATH': '', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': '1'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith('CLASSES'))


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_checkpoint_and_export_serve_people_without_this_package(
    tmp_path: Path,
    task: str,
    load_tool: Callable[[str], ModuleType],  # noqa: F811
) -> None:
    if task == 'seg':
        model = toy_distiller(terms=dict(pixel=toy_terms()['pixel']))
        classes = CLASSES
    else:
        model, classes = toy_detector_distiller(), OBJECT_CLASSES
    cfg = toy_config(model, tmp_path / 'work', max_iters=2, task=task)
    cfg.test_dataloader, cfg.test_cfg = cfg.val_dataloader, dict(type='TestLoop')
    cfg.test_evaluator = cfg.val_evaluator
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.custom_hooks = [dict(type='mmstructkd.FiniteLossHook'), dict(type='EMAHook')]
    cfg.dump(tmp_path / 'distilled.py')
    Runner.from_cfg(cfg).train()
    file = tmp_path / 'work' / 'iter_2.pth'
    assert 'mmstructkd' not in read_checkpoint(file)['meta']['cfg']
    shown = run_without(tmp_path, file, task)
    assert shown == f'CLASSES {" ".join(classes)} {len(classes)}'
    out = tmp_path / 'student.pth'
    assert load_tool('export_student').main([str(tmp_path / 'distilled.py'), str(file), '--out', str(out)]) == 0
    assert run_without(tmp_path, out, task) == shown


def toy_detector_distiller() -> dict:
    terms = dict(scores=dict(tap='bbox_head.retina_cls', loss=dict(type='mmstructkd.ChannelwiseKLLoss')))
    return toy_distiller(
        student=toy_detector('retinanet', 4),
        teacher=dict(config=toy_detector('retinanet', 8), allow_random=True),
        terms=terms,
    )


def test_a_resumed_run_writes_the_same(tmp_path: Path) -> None:
    model = toy_distiller(terms=dict(pixel=toy_terms()['pixel']))
    Runner.from_cfg(toy_config(model, tmp_path, max_iters=2)).train()
    Runner.from_cfg(toy_config(model, tmp_path, max_iters=4, resume=True)).train()
    content = read_checkpoint(tmp_path / 'iter_4.pth')
    assert 'mmstructkd' not in content['meta']['cfg']
    assert content['message_hub']['runtime_info']['cfg'] == content['meta']['cfg']
    assert 'StructuredDistiller' in content['mmstructkd']['config']
