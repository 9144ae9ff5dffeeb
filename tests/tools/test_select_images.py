"""Images that a teacher selects: the list, the labels, and a training with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner

from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_depth_estimator, toy_distiller, toy_segmentor

SIZE = (48, 64)
CLASSES = 5
NAMES = [f'{"ab"[number % 2]}/{number}.png' for number in range(9)]


@pytest.fixture(scope='module')
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('select_images')


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes with labels, one of them without any labelled pixel."""
    root = tmp_path_factory.mktemp('data')
    generator = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        height, width = SIZE if number % 3 else (SIZE[0], SIZE[1] - 16)
        image = cv2.resize(generator.integers(0, 256, (4, 6, 3), dtype=np.uint8), (width, height))
        labels = generator.integers(0, CLASSES, (height, width), dtype=np.uint8)
        labels[:4] = 255
        depth = generator.uniform(1, 20, (height, width)).astype(np.float32)
        depth[:4] = 0
        if number == 8:
            labels[:], depth[:] = 255, 0
        for folder in ('images', 'labels', 'depth'):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / 'images' / name), image)
        cv2.imwrite(str(root / 'labels' / name), labels)
        cv2.imwrite(str(root / 'depth' / name), (depth * 256).astype(np.uint16))
    return root


def as_input(image: np.ndarray) -> torch.Tensor:
    """An image normalised, and padded at the right and below, (1, 3, H, W)."""
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    values = np.zeros((3, *SIZE), np.float32)
    values[:, : image.shape[0], : image.shape[1]] = ((image[..., ::-1] - mean) / std).transpose(2, 0, 1)
    return torch.from_numpy(values)[None]


def model_of(kind: str, width: int = 4) -> ConfigDict:
    """A network whose preprocessor pads images in a test as well."""
    if kind == 'depth':
        model = toy_depth_estimator(width)
    elif kind == 'sigmoid':
        model = toy_segmentor(width, num_classes=2)
        model.pop('auxiliary_head')
        model.decode_head.update(out_channels=1, threshold=0.4)
        model.decode_head.loss_decode.use_sigmoid = True
    else:
        model = toy_segmentor(width, num_classes=CLASSES)
    model.data_preprocessor.test_cfg = dict(size=SIZE)
    return model


def write_network(kind: str, data: Path, folder: Path, width: int = 4, seed: int = 0) -> tuple[str, str]:
    """A config with its datasets, and the weights of a random network that is sure of something."""
    model = model_of(kind, width)
    torch.manual_seed(seed)
    network = MODELS.build(model)
    if kind != 'depth':
        torch.nn.init.normal_(network.decode_head.conv_seg.weight, std=0.5)
        seen = torch.cat([as_input(cv2.imread(str(data / 'images' / name))) for name in NAMES])
        with torch.no_grad():  # no class prevails in all images
            scores = network.eval().encode_decode(seen, [dict(img_shape=SIZE)])
            network.decode_head.conv_seg.bias -= scores.mean((0, 2, 3))
    annotation = (
        dict(type='LoadDepthAnnotation', depth_rescale_factor=1 / 256)
        if kind == 'depth'
        else dict(type='LoadAnnotations')
    )
    pipeline = [dict(type='LoadImageFromFile'), annotation, dict(type='PackSegInputs')]
    prefix = dict(
        img_path='images', **(dict(depth_map_path='depth') if kind == 'depth' else dict(seg_map_path='labels'))
    )
    dataset = dict(data_root=str(data), data_prefix=prefix, img_suffix='.png', pipeline=pipeline)
    if kind == 'depth':
        dataset.update(type='mmstructkd.DepthFolderDataset')
    else:
        dataset.update(type='BaseSegDataset', seg_map_suffix='.png', metainfo=dict(classes=list('abcde')))
    cfg = toy_config(model, folder / 'work', task='depth' if kind == 'depth' else 'seg')
    random = [*pipeline[:-1], dict(type='RandomFlip', prob=1.0), pipeline[-1]]
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=dict(dataset, pipeline=random))
    cfg.val_dataloader.dataset = dict(dataset, test_mode=True)
    cfg.dump(folder / f'{kind}{width}.py')
    torch.save(dict(state_dict=network.state_dict()), folder / f'{kind}{width}.pth')
    return str(folder / f'{kind}{width}.py'), str(folder / f'{kind}{width}.pth')


@pytest.fixture(scope='module')
def networks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp('networks')
    init_default_scope('mmseg')
    return {
        'seg': write_network('seg', data, folder),
        'sigmoid': write_network('sigmoid', data, folder),
        'depth': write_network('depth', data, folder),
        'student': write_network('seg', data, folder, width=6, seed=1),
    }


# --- the loop reference: one image after the other, in numpy, with a network of one's own -----------------------------


def answer(kind: str, files: tuple[str, str], image: np.ndarray, width: int = 4) -> np.ndarray:
    """Probabilities (C, H, W), or metres (H, W), of an image as it is."""
    network = MODELS.build(model_of(kind, width)).eval()
    network.load_state_dict(torch.load(files[1])['state_dict'])
    height, broad = image.shape[:2]
    with torch.no_grad():
        scores = network.encode_decode(as_input(image), [dict(img_shape=SIZE)])
    scores = scores[0, :, :height, :broad].double().numpy()
    if kind == 'depth':
        return scores[0]
    if kind == 'sigmoid':
        one = 1 / (1 + np.exp(-scores[0]))
        return np.stack([1 - one, one])
    scores = np.exp(scores - scores.max(0))
    return scores / scores.sum(0)


def reference(kind: str, networks: dict, data: Path, by: str, quantile: float, student: bool = False) -> tuple:
    """Names that are kept, and the prediction of each."""
    errors, groups, answers = {}, {}, {}
    for name in NAMES:
        image = cv2.imread(str(data / 'images' / name))
        one = answer(kind, networks[kind], image)
        if by == 'flip':
            other = answer(kind, networks[kind], np.ascontiguousarray(image[:, ::-1]))[..., ::-1]
            if kind == 'depth':
                errors[name] = np.mean(abs(one - other) / ((one + other) / 2))
            else:
                middle = (one + other) / 2
                parts = [(p * np.log(p / middle)).sum(0) for p in (one, other)]
                errors[name] = np.mean(sum(parts) / 2)
        elif by == 'confidence':
            sure = one.max(0) * (answer('seg', networks['student'], image, 6).max(0) if student else 1)
            errors[name] = 1 - sure.mean()
        elif kind == 'depth':
            label = cv2.imread(str(data / 'depth' / name), cv2.IMREAD_UNCHANGED) / 256
            known = label > 0
            apart = abs(one - label) / ((one + label) / 2)
            errors[name] = apart[known].mean() if known.any() else math.nan
        else:
            label = cv2.imread(str(data / 'labels' / name), cv2.IMREAD_UNCHANGED)
            losses = [
                -np.log(one[label[i, j], i, j])
                for i in range(label.shape[0])
                for j in range(label.shape[1])
                if label[i, j] < len(one)
            ]
            errors[name] = np.mean(losses) if losses else math.nan
        predicted = one if kind == 'depth' else one.argmax(0) if kind == 'seg' else (one[1] > 0.4).astype(int)
        answers[name] = predicted
        groups[name] = 0 if kind == 'depth' else int(np.bincount(predicted.ravel()).argmax())
    kept = []
    for name in sorted(NAMES):
        rivals = [errors[n] for n in NAMES if groups[n] == groups[name] and not math.isnan(errors[n])]
        if rivals and errors[name] < np.quantile(rivals, quantile):
            kept.append(name)
    return kept, answers, groups


CASES = [
    ('seg', 'confidence', ()),
    ('seg', 'confidence', ('--student',)),
    ('seg', 'flip', ('--by', 'flip')),
    ('seg', 'loss', ('--dataset', 'val')),
    ('seg', 'loss', ('--dataset', 'train')),
    ('sigmoid', 'confidence', ()),
    ('sigmoid', 'flip', ('--by', 'flip')),
    ('sigmoid', 'loss', ('--dataset', 'train')),
    ('depth', 'flip', ()),
    ('depth', 'loss', ('--dataset', 'train')),
]


@pytest.mark.parametrize(('kind', 'by', 'more'), CASES)
def test_list_and_labels_are_those_of_a_loop(
    tool: ModuleType, networks: dict, data: Path, tmp_path: Path, kind: str, by: str, more: tuple
) -> None:
    student = more == ('--student',)
    more = ('--student', *networks['student']) if student else more
    written = ('--write-labels', '--device', 'cpu')
    out = tmp_path / 'lists' / 'kept.txt'
    for quantile in (0.4, 0.8):
        got = tool.main(
            [*networks[kind], str(data / 'images'), '--out', str(out), '--quantile', str(quantile), *more, *written]
        )
        want, answers, _ = reference(kind, networks, data, by, quantile, student)
        assert 0 < len(want) < len(NAMES)
        assert sorted(got) == want
        assert out.read_text() == ''.join(f'{name}\n' for name in got)
        for name in got:
            file = tmp_path / 'lists' / 'kept_labels' / f'{name}{".npy" if kind == "depth" else ".png"}'
            if kind == 'depth':
                np.testing.assert_allclose(np.load(file), answers[name], rtol=1e-4)
                assert np.load(file).dtype == np.float32
            else:
                labels = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
                assert labels.dtype == np.uint8
                assert (labels == answers[name]).mean() > 0.999


def test_the_quantile_is_that_of_each_class(
    tool: ModuleType, networks: dict, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [*networks['seg'], str(data / 'images'), '--out', str(tmp_path / 'kept.txt'), '--device', 'cpu']
    tool.main(arguments)
    _, _, groups = reference('seg', networks, data, 'confidence', 0.7)
    shown = [line.split('|') for line in capsys.readouterr().out.splitlines() if line.startswith('| ')][2:]
    counts = {int(row[1]): int(row[2]) for row in shown}
    assert len(counts) > 1, 'the images must fall into several classes for this test to say something'
    assert counts == {group: list(groups.values()).count(group) for group in groups.values()}
    assert not (tmp_path / 'kept_labels').exists()


@pytest.mark.parametrize('kind', ['seg', 'depth'])
def test_a_student_learns_from_what_is_kept(
    tool: ModuleType, networks: dict, data: Path, tmp_path: Path, kind: str
) -> None:
    out, folder = tmp_path / 'kept.txt', tmp_path / 'given'
    kept = tool.main(
        [*networks[kind], str(data / 'images'), '--out', str(out), '--write-labels', str(folder), '--device', 'cpu']
    )
    init_default_scope('mmseg')
    load = dict(type='LoadImageFromFile')
    size = [dict(type='Resize', scale=SIZE[::-1], keep_ratio=False), dict(type='PackSegInputs')]
    web = dict(type='mmstructkd.ImageFolderDataset', data_root=str(data / 'images'), ann_file=str(out))
    if kind == 'depth':
        annotation = dict(type='LoadDepthAnnotation', decode_backend='numpy')
        labels, field = dict(depth_map_path=str(folder)), 'gt_depth_map'
    else:
        annotation, labels, field = dict(type='LoadAnnotations'), dict(seg_map_path=str(folder)), 'gt_sem_seg'
    labelled = dict(web, labels=labels, pipeline=[load, annotation, *size])
    given = DATASETS.build(labelled)
    assert [Path(given.get_data_info(i)['img_path']) for i in range(len(given))] == [data / 'images' / n for n in kept]
    assert all(torch.isfinite(getattr(sample['data_samples'], field).data.float()).all() for sample in given)
    student, teacher = (model_of(kind, width) for width in (4, 4))
    term = dict(
        on='web',
        tap='backbone[3]' if kind == 'depth' else 'decode_head.conv_seg',
        loss=dict(type='mmstructkd.FeatureMSELoss' if kind == 'depth' else 'mmstructkd.PixelwiseKLLoss'),
    )
    model = toy_distiller(
        student=student,
        teacher=dict(config=teacher, checkpoint=networks[kind][1]),
        terms=dict(kd=term),
        streams=dict(web=dict(type='mmstructkd.DataStream')),
    )
    cfg = toy_config(model, tmp_path / 'work', max_iters=2, task='depth' if kind == 'depth' else 'seg')
    cfg.train_dataloader.dataset = dict(
        type='mmstructkd.PairedDataset', dataset=labelled, web=dict(web, pipeline=[load, *size])
    )
    for key in ('val_dataloader', 'val_evaluator', 'val_cfg'):
        cfg[key] = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss_kd_kd_web')
    values = [float(value) for value in losses.data[0]]
    assert len(values) == 2
    assert all(math.isfinite(value) and value > 0 for value in values)


def test_a_list_among_the_images(tool: ModuleType, networks: dict, data: Path, tmp_path: Path) -> None:
    web = tmp_path / 'web'
    web.mkdir()
    for number, name in enumerate(NAMES):
        cv2.imwrite(str(web / f'{number}.png'), cv2.imread(str(data / 'images' / name)))
    arguments = [*networks['seg'], str(web), '--out', str(web / 'kept.txt'), '--write-labels', '--device', 'cpu']
    first = tool.main(arguments)
    assert (web / 'kept_labels' / f'{first[0]}.png').is_file()
    assert tool.main(arguments) == first, 'the labels of the first run are no images'


def test_files_that_are_no_images_are_told(
    tool: ModuleType, networks: dict, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    web = tmp_path / 'web'
    web.mkdir()
    (web / 'page.jpg').write_text('<html>')
    arguments = [*networks['depth'], str(web), '--out', str(tmp_path / 'kept.txt'), '--device', 'cpu']
    with pytest.raises(ConfigError, match=r"must hold images that the pipeline can load, .* 'page.jpg'"):
        tool.main(arguments)
    assert not (tmp_path / 'kept.txt').exists()
    for number, name in enumerate(NAMES[:3]):
        cv2.imwrite(str(web / f'{number}.png'), cv2.imread(str(data / 'images' / name)))
    kept = tool.main(arguments)
    assert 'page.jpg cannot be loaded' in capsys.readouterr().out
    assert len(kept) == 2


def test_an_image_is_told_from_one_of_another_ending(
    tool: ModuleType, networks: dict, data: Path, tmp_path: Path
) -> None:
    web = tmp_path / 'web'
    web.mkdir()
    for number, name in enumerate(NAMES[:4]):
        cv2.imwrite(str(web / f'{number // 2}{(".png", ".bmp")[number % 2]}'), cv2.imread(str(data / 'images' / name)))
    kept = tool.main(
        [*networks['depth'], str(web), '--out', str(tmp_path / 'kept.txt'), '--quantile', '1', '--write-labels']
    )
    assert len(kept) == 3  # all but the worst
    assert sorted(path.name for path in (tmp_path / 'kept_labels').iterdir()) == sorted(f'{name}.npy' for name in kept)


def test_a_detector_is_refused(tool: ModuleType, detector: Callable, data: Path, tmp_path: Path) -> None:
    toy_config(detector(4), tmp_path / 'work', task='det').dump(tmp_path / 'det.py')
    with pytest.raises(
        ConfigError, match='must be of a segmentor or depth estimator, got RetinaNet. The error of a set'
    ):
        tool.main([str(tmp_path / 'det.py'), 'none.pth', str(data / 'images'), '--out', str(tmp_path / 'kept.txt')])


def test_a_file_that_runs_code_needs_consent(tool: ModuleType, networks: dict, data: Path, tmp_path: Path) -> None:
    content = dict(torch.load(networks['depth'][1]), extra=Path('somewhere'))
    torch.save(content, tmp_path / 'more.pth')
    arguments = [networks['depth'][0], str(tmp_path / 'more.pth'), str(data / 'images'), '--device', 'cpu']
    arguments += ['--out', str(tmp_path / 'kept.txt')]
    with pytest.raises(CheckpointError, match='trust-checkpoint'):
        tool.main(arguments)
    with pytest.raises(ConfigError, match="`trust_checkpoint` must be True or False, got 'no'"):
        tool.main([*arguments, '--cfg-options', 'trust_checkpoint=no'])
    assert tool.main([*arguments, '--trust-checkpoint'])


@pytest.mark.parametrize('more', [('--quantile', '0'), ('--quantile', '1.5'), ('--by', 'loss'), ('--quantile', 'nan')])
def test_arguments_that_cannot_be(tool: ModuleType, networks: dict, data: Path, tmp_path: Path, more: tuple) -> None:
    with pytest.raises(SystemExit):
        tool.main([*networks['seg'], str(data / 'images'), '--out', str(tmp_path / 'kept.txt'), *more])


def test_mistakes_are_named(tool: ModuleType, networks: dict, data: Path, tmp_path: Path) -> None:
    files = dict(networks)

    def call(kind: str, images: Path, *more: Any) -> None:
        tool.main([*files[kind], str(images), '--out', str(tmp_path / 'kept.txt'), '--device', 'cpu', *more])

    with pytest.raises(ConfigError, match='`--by` must be flip or loss for depth'):
        call('depth', data / 'images', '--by', 'confidence')
    with pytest.raises(ConfigError, match='`--student` must come with --by confidence, got flip'):
        call('seg', data / 'images', '--by', 'flip', '--student', *networks['student'])
    with pytest.raises(ConfigError, match='`--student` must be a segmentor, got DepthEstimator'):
        call('seg', data / 'images', '--student', *networks['depth'])
    with pytest.raises(ConfigError, match='`data_root` must be a folder that exists'):
        call('seg', tmp_path / 'nowhere')
    with pytest.raises(ConfigError, match='`images` must be the folder of the images of `val_dataloader`'):
        call('seg', tmp_path, '--dataset', 'val')
    with pytest.raises(ConfigError, match='must define `test_dataloader` for --dataset test'):
        call('seg', data / 'images', '--dataset', 'test')
    cfg = tool.read_config(networks['seg'][0], None, 'test')
    cfg.val_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    cfg.dump(tmp_path / 'bare.py')
    files['bare'] = (str(tmp_path / 'bare.py'), networks['seg'][1])
    with pytest.raises(ConfigError, match='must load `gt_sem_seg` for --by loss'):
        call('bare', data / 'images', '--dataset', 'val')
    one = tmp_path / 'one'
    one.mkdir()
    cv2.imwrite(str(one / 'a.png'), cv2.imread(str(data / 'images' / NAMES[0])))
    with pytest.raises(ConfigError, match='`--quantile` must leave an image, got 0.7 of 1'):
        call('seg', one)
    cv2.imwrite(str(one / ' b.png'), cv2.imread(str(data / 'images' / NAMES[0])))
    with pytest.raises(ConfigError, match="`images` must have names that a list can hold, got ' b.png'"):
        call('seg', one)
    assert not (tmp_path / 'kept.txt').exists()


def test_more_classes_than_a_file_of_labels_can_hold(tool: ModuleType, data: Path, tmp_path: Path) -> None:
    model = toy_segmentor(4, num_classes=256)
    torch.save(dict(state_dict=MODELS.build(model).state_dict()), tmp_path / 'many.pth')
    toy_config(model, tmp_path / 'work').dump(tmp_path / 'many.py')
    arguments = [str(tmp_path / 'many.py'), str(tmp_path / 'many.pth'), str(data / 'images')]
    with pytest.raises(ConfigError, match='`--write-labels` must have at most 255 classes, got 256'):
        tool.main([*arguments, '--out', str(tmp_path / 'kept.txt'), '--write-labels', '--device', 'cpu'])
    assert not (tmp_path / 'kept.txt').exists()


def test_labels_of_a_folder_are_checked(networks: dict, data: Path) -> None:
    init_default_scope('mmseg')
    config = dict(type='mmstructkd.ImageFolderDataset', data_root=str(data / 'images'), pipeline=[])
    for bad in ({}, dict(other='x'), 'folder', dict(seg_map_path='a', depth_map_path='b')):
        with pytest.raises(ConfigError, match='`labels` must give one folder'):
            DATASETS.build(dict(config, labels=bad))
    with pytest.raises(ConfigError, match='`labels` must hold the labels of every image'):
        DATASETS.build(dict(config, labels=dict(seg_map_path=str(data / 'nowhere'))))


def test_embedded_scenes_are_loaded_from_files(tool: ModuleType) -> None:
    cfg = toy_config(toy_segmentor(4), 'work')
    steps = tool.pipeline_of_test(cfg, labels=False)
    assert [step['type'] for step in steps] == ['LoadImageFromFile', 'PackSegInputs']
    cfg.pop('val_dataloader')
    with pytest.raises(ConfigError, match='must define the pipeline of its test'):
        tool.pipeline_of_test(cfg, labels=False)
