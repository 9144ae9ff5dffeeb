"""The names of the classes of both networks, compared before training where a term takes class k for class k."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from mmengine.runner import Runner
from torch import nn

from mmstructkd.datasets.scenes import CLASSES, OBJECT_CLASSES
from mmstructkd.distillers import class_names as module
from mmstructkd.distillers.class_names import check_class_names, names_of_config, names_of_dataset, names_of_teacher
from mmstructkd.distillers.preflight import build_distiller
from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_detector, toy_distiller, toy_segmentor

ORDER = [1, 0, *range(2, len(CLASSES))]
PERMUTED = tuple(CLASSES[k] for k in ORDER)
PIXEL = dict(type='mmstructkd.PixelwiseKLLoss')


def saved(folder: Path, classes: object, key: str = 'dataset_meta') -> str:
    """A teacher's checkpoint with class names in its meta information."""
    torch.manual_seed(0)
    network = MODELS.build(toy_segmentor(8))
    meta = {'dataset_meta': {'classes': classes}} if key == 'dataset_meta' else {key: classes}
    path = folder / 'teacher.pth'
    torch.save({'meta': meta, 'state_dict': network.state_dict()}, path)
    return str(path)


def config(checkpoint: str | None, folder: Path, term: dict | None = None, **terms: dict) -> Config:
    wanted = {name: dict(tap='decode_head.conv_seg', loss=loss) for name, loss in terms.items()}
    if term is not None:
        wanted['one'] = term
    teacher = dict(config=toy_segmentor(8), checkpoint=checkpoint, allow_random=checkpoint is None)
    return toy_config(toy_distiller(teacher=teacher, terms=wanted), folder, max_iters=1)


def compare(checkpoint: str, folder: Path, term: dict | None = None, **terms: dict) -> None:
    """What the hook does before the first batch, without a run."""
    model = MODELS.build(config(checkpoint, folder, term, **terms).model)
    check_class_names(model.terms.values(), CLASSES, names_of_teacher(model.teacher))


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(module, 'print_log', lambda text, logger, level: texts.append(text))
    return texts


@pytest.mark.parametrize(
    'loss',
    [
        PIXEL,
        dict(type='mmstructkd.DistLoss'),
        dict(type='mmstructkd.ChannelwiseKLLoss'),
        dict(type='mmstructkd.HolisticLoss', critic=dict(base_channels=2)),
        dict(type='mmstructkd.CategorySimilarityLoss'),
    ],
    ids=lambda loss: loss['type'].split('.')[1],
)
def test_permuted_classes(loss: dict, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"term 'logits': the classes of the teacher must be .* same order") as found:
        compare(saved(tmp_path, PERMUTED), tmp_path, logits=loss)
    assert f'class_map={ORDER}' in str(found.value)
    assert f'class 0 is {CLASSES[0]!r} of the student and {CLASSES[1]!r} of the teacher' in str(found.value)
    if loss['type'].endswith(('PixelwiseKLLoss', 'DistLoss')):
        assert f'Write class_map={ORDER} in its loss' in str(found.value)
    else:
        assert 'PixelwiseKLLoss and DistLoss take class_map' in str(found.value)


def test_a_run_with_permuted_classes_does_not_begin(tmp_path: Path) -> None:
    runner = Runner.from_cfg(config(saved(tmp_path, PERMUTED), tmp_path, logits=PIXEL))
    with pytest.raises(ConfigError, match=rf"term 'logits': .*class_map=\[{', '.join(map(str, ORDER))}\] in its loss"):
        runner.train()
    assert runner.iter == 0


def test_the_map_of_the_message_trains(tmp_path: Path, warned: list[str]) -> None:
    path = saved(tmp_path, PERMUTED)
    Runner.from_cfg(config(path, tmp_path, logits=dict(PIXEL, class_map=ORDER))).train()
    assert warned == []
    compare(path, tmp_path, logits=dict(PIXEL, class_map=list(range(len(CLASSES)))))
    assert len(warned) == 1
    assert f'where the names of the classes say {ORDER}' in warned[0]


@pytest.mark.parametrize('key', ['dataset_meta', 'classes', 'CLASSES'])
def test_where_a_checkpoint_keeps_its_names(key: str, tmp_path: Path) -> None:
    """As mmengine writes them, and as mmseg 0.x and mmdet 2.x did."""
    with pytest.raises(ConfigError, match='the same names in another order'):
        compare(saved(tmp_path, list(PERMUTED), key), tmp_path, logits=PIXEL)


def test_features_have_no_classes(tmp_path: Path, warned: list[str]) -> None:
    path = saved(tmp_path, PERMUTED)
    affinity = dict(tap='decode_head.convs', loss=dict(type='mmstructkd.PairwiseAffinityLoss'))
    compare(path, tmp_path, affinity)
    channel = dict(tap='backbone[3]', loss=dict(type='mmstructkd.ChannelwiseKLLoss'))
    compare(path, tmp_path, channel)
    assert warned == []


@pytest.mark.parametrize(
    ('classes', 'shown'),
    [
        ((*CLASSES[:3], 'unicorn', *CLASSES[4:]), f"class 3: {CLASSES[3]!r} and 'unicorn'"),
        (CLASSES[:-1], f'class {len(CLASSES) - 1}: {CLASSES[-1]!r} and missing'),
        ((*CLASSES, 'more'), f"class {len(CLASSES)}: missing and 'more'"),
    ],
)
def test_other_names_are_warned_of(classes: tuple, shown: str, tmp_path: Path, warned: list[str]) -> None:
    compare(saved(tmp_path, classes), tmp_path, logits=PIXEL)
    assert len(warned) == 1
    assert warned[0].startswith("term 'logits': the classes of student and teacher have other names")
    assert shown in warned[0]


@pytest.mark.parametrize(
    'classes', [None, 'abc', (), tuple(name.upper().replace(' ', '_') for name in CLASSES), CLASSES]
)
def test_no_names_and_the_same_names_say_nothing(classes: object, tmp_path: Path, warned: list[str]) -> None:
    compare(saved(tmp_path, classes), tmp_path, logits=PIXEL)
    assert warned == []


def test_the_teachers_config_names_its_dataset(tmp_path: Path) -> None:
    """A random teacher, or one whose checkpoint has no meta: the dataset of its config, by metainfo or by class."""
    whole = toy_config(toy_segmentor(8), tmp_path)
    assert names_of_config(whole) == tuple(CLASSES)
    assert names_of_config(toy_segmentor(8)) is None
    whole.train_dataloader.dataset.metainfo = dict(classes=PERMUTED)
    path = tmp_path / 'teacher.py'
    whole.dump(str(path))
    assert names_of_config(str(path)) == PERMUTED
    wrapped = dict(
        whole.train_dataloader, dataset=dict(type='RepeatDataset', times=2, dataset=whole.train_dataloader.dataset)
    )
    assert names_of_config(dict(default_scope='mmseg', train_dataloader=wrapped)) == PERMUTED
    assert names_of_config('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py')[0] == 'road'
    assert names_of_config(str(tmp_path / 'missing.py')) is None
    teacher = dict(config=str(path), allow_random=True)
    run = toy_config(
        toy_distiller(teacher=teacher, terms=dict(logits=dict(tap='decode_head.conv_seg', loss=PIXEL))), tmp_path
    )
    with pytest.raises(ConfigError, match=r"term 'logits': .*Write class_map=\[1, 0, 2"):
        Runner.from_cfg(run).train()
    with pytest.raises(ConfigError, match=r"term 'logits': .*Write class_map=\[1, 0, 2"):
        build_distiller(run)


def test_wrapped_datasets() -> None:
    one = BaseDataset(metainfo=dict(classes=('a', 'b')), lazy_init=True, serialize_data=False)
    assert names_of_dataset(one) == ('a', 'b')
    assert names_of_dataset(RepeatDataset(one, 2, lazy_init=True)) == ('a', 'b')
    assert names_of_dataset(ConcatDataset([one, one], lazy_init=True)) == ('a', 'b')
    assert names_of_dataset(SimpleNamespace(dataset=SimpleNamespace(datasets=[one]))) == ('a', 'b')
    assert names_of_dataset(SimpleNamespace()) is None
    assert names_of_dataset(None) is None
    assert names_of_teacher(SimpleNamespace(checkpoint=None, source=None)) is None


def test_the_background_of_a_box_head_stays_last() -> None:
    region = dict(region=dict(tap='roi_head.bbox_head.fc_cls', loss=PIXEL))
    teacher = dict(config=toy_detector('faster_rcnn', 4), allow_random=True)
    model = MODELS.build(toy_distiller(student=toy_detector('faster_rcnn', 2), teacher=teacher, terms=region))
    swapped = (OBJECT_CLASSES[1], OBJECT_CLASSES[0], *OBJECT_CLASSES[2:])
    number = len(OBJECT_CLASSES)
    wanted = [1, 0, *range(2, number + 1)]
    with pytest.raises(ConfigError) as found:
        check_class_names(model.terms.values(), OBJECT_CLASSES, swapped)
    assert f'class_map={wanted}' in str(found.value)
    region['region']['loss'] = dict(PIXEL, class_map=wanted)
    mapped = MODELS.build(toy_distiller(student=toy_detector('faster_rcnn', 2), teacher=teacher, terms=region))
    check_class_names(mapped.terms.values(), OBJECT_CLASSES, swapped)


def test_binary_scores_of_a_detector_are_classes() -> None:
    terms = dict(score=dict(tap='bbox_head.retina_cls', loss=dict(type='mmstructkd.BinaryKLLoss', anchors=9)))
    teacher = dict(config=toy_detector('retinanet', 4), allow_random=True)
    model = MODELS.build(toy_distiller(student=toy_detector('retinanet', 2), teacher=teacher, terms=terms))
    with pytest.raises(ConfigError, match="term 'score': .* in another order"):
        check_class_names(model.terms.values(), OBJECT_CLASSES, OBJECT_CLASSES[::-1])


def test_names_that_occur_twice_cannot_be_ordered(warned: list[str]) -> None:
    term = SimpleNamespace(name='x', by_class=True, loss=nn.Identity(), levels=())
    check_class_names([term], ('a', 'a', 'b'), ('a', 'b', 'a'))
    assert len(warned) == 1
