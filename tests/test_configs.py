"""Every shipped config is read, checked against its name and its data, and built with its weights off."""

from __future__ import annotations

import copy
import functools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import mmdet
import mmengine.config.utils
import mmseg
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmstructkd import compat
from mmstructkd.losses import DistillLoss
from mmstructkd.registry import MODELS as OWN
from mmstructkd.tasks.batches import synthetic_batch
from mmstructkd.teachers import TeacherSource

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts
)
METHODS = ('structkd', 'cwd', 'pkd')
#: Folders of several methods, each on one pair.
FAMILIES = {
    'features': ('fitnet', 'at', 'nfd', 'mgd', 'reviewkd', 'pefd', 'simreg', 'srd', 'dfa'),
    'logits': ('kd', 'dist', 'dkd', 'wsl', 'zipf', 'binary'),
    'classes': ('icsd', 'dsd', 'ifvd'),
    'relations': ('sp', 'rkd', 'cckd', 'lsp', 'cirkd', 'crd'),
    'depth': ('regression', 'scale-shift', 'gradient', 'ordinal', 'normals'),
    'detection': ('fgd', 'ld', 'binary'),
}
DISTILLED = (*METHODS, *FAMILIES)
#: Folders whose file names follow `<networks>_<gpus>xb<batch>-<iterations>k_<dataset>-<crop>`, detectors
#: `<networks>_<gpus>xb<batch>-<epochs>e_<dataset>`.
NAMED = [path for path in CONFIGS if path.split('/')[1] in (*DISTILLED, 'plain')]
#: Those of the families, pair by pair: the networks of a pair are built once.
FAMILY = sorted((path for path in NAMED if path.split('/')[1] in FAMILIES), key=lambda path: path.split('_', 1)[1])
#: Formatting a dump takes seconds, so one of each way to name student and teacher stands for the rest.
DUMPED = [
    path
    for path in NAMED
    if re.search(r'structkd_.*_(4xb2-40k_cityscapes|.*(camvid|kitti))-\d+x\d+\.py$|pkd_mask-rcnn.*\.py$', path)
]
#: What StructKD and CWD ship for segmentation: teacher_student and the dataset.
SEGMENTORS = {
    ('pspnet-r101-d8_pspnet-r18-d8', 'cityscapes-512x1024'),
    ('deeplabv3-r101-d8_deeplabv3-r18-d8', 'cityscapes-512x1024'),
    ('deeplabv3-r101-d8_deeplabv3-mobilenet-v2-d8', 'cityscapes-512x1024'),
    ('segformer-b4_segformer-b0', 'cityscapes-1024x1024'),
    ('pspnet-r101-d8_pspnet-r18-d8', 'ade20k-512x512'),
    ('pspnet-r101-d8_pspnet-r18-d8', 'voc12aug-512x512'),
    ('pspnet-r101-d8_pspnet-r18-d8', 'camvid-360x480'),
}
#: What each method ships.
PAIRS = {
    'structkd': {
        *SEGMENTORS,
        ('depth-fpn-r101_depth-fpn-mobilenet-v2', 'nyu-480x480'),
        ('depth-fpn-r101_depth-fpn-r18', 'nyu-480x480'),
        ('depth-fpn-r101_depth-fpn-r18', 'kitti-352x704'),
        ('fcos-r101_fcos-mobilenet-v2', 'coco'),
        ('retinanet-x101_retinanet-r50', 'coco'),
        ('gfl-r101_gfl-r50', 'coco'),
        ('faster-rcnn-r101_faster-rcnn-r50', 'coco'),
        ('mask-rcnn-swin-s_retinanet-r50', 'coco'),
    },
    'cwd': {
        *SEGMENTORS,
        ('retinanet-r101_retinanet-r50', 'coco'),
        ('gfl-r101_gfl-r50', 'coco'),
        ('faster-rcnn-r101_faster-rcnn-r50', 'coco'),
    },
    'pkd': {
        ('faster-rcnn-r101_faster-rcnn-r50', 'coco'),
        ('retinanet-x101_retinanet-r50', 'coco'),
        ('fcos-x101_retinanet-r50', 'coco'),
        ('mask-rcnn-swin-s_retinanet-r50', 'coco'),
    },
}


NAME = re.compile(
    r'(?P<networks>.+)_(?P<gpus>\d+)xb(?P<batch>\d+)-((?P<thousands>\d+)k|(?P<epochs>\d+)e)'
    r'_(?P<data>[a-z0-9]+)(-(?P<h>\d+)x(?P<w>\d+))?$'
)
DATA_TYPES = {
    'cityscapes': 'CityscapesDataset',
    'ade20k': 'ADE20KDataset',
    'voc12aug': 'PascalVOCDataset',
    'camvid': 'mmstructkd.CamVidDataset',
    'nyu': 'NYUDataset',
    'kitti': 'mmstructkd.KITTIEigenDataset',
    'coco': 'CocoDataset',
}


def short(path: str) -> str:
    """Name a case: pytest numbers those of more than a hundred characters."""
    return path.removeprefix('configs/').removesuffix('.py')


@pytest.fixture(scope='module', autouse=True)
def _metafiles_read_once():
    """For each `mmseg::` base mmengine reads every metafile of mmseg anew: a third of the time of these tests."""
    original = mmengine.config.utils._get_cfg_metainfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmengine.config.utils, '_get_cfg_metainfo', functools.cache(original))
        yield


@pytest.fixture(autouse=True)
def _as_in_a_run():
    """Work-arounds in place, and mmseg as the scope where no config says otherwise."""
    compat.install()
    init_default_scope('mmseg')


@functools.cache
def _read_once(path: str) -> Config:
    return Config.fromfile(ROOT / path)


def read(path: str) -> Config:
    """Read a config by its path in the repository and enter its scope; the caller may change what it gets."""
    cfg = copy.deepcopy(_read_once(path))
    init_default_scope(cfg.default_scope)
    return cfg


def beside(path: str) -> str:
    """Path in the repository of a config that another one names by its own folder."""
    return Path(path).resolve().relative_to(ROOT).as_posix()


def network(cfg: Config) -> Any:
    """Return the config of the network that is trained: the student, or the plain model."""
    return cfg.model.student if is_distilled(cfg) else cfg.model


def losses() -> list[type[DistillLoss]]:
    """Return the registered losses."""
    own = [kind for kind in OWN.module_dict.values() if kind.__module__.startswith('mmstructkd.losses.')]
    return [kind for kind in own if issubclass(kind, DistillLoss)]


def heads(model: Any) -> list[Any]:
    """Return the configs of all heads that give what the network is for."""
    places = [*(model.get(name) for name in ('decode_head', 'auxiliary_head', 'bbox_head'))]
    places += [(model.get('roi_head') or {}).get(name) for name in ('bbox_head', 'mask_head')]
    return [head for place in places if place for head in (place if isinstance(place, list) else [place])]


def is_distilled(cfg: Config) -> bool:
    """Tell whether a config distils."""
    return cfg.model.type == 'mmstructkd.StructuredDistiller'


def without_weights(model: Any) -> Any:
    """Switch off, in place, every file that building or initialising ``model`` would load."""
    if isinstance(model, dict):
        if 'pretrained' in model:
            model['pretrained'] = None
        if isinstance(model.get('init_cfg'), dict) and model['init_cfg'].get('type') == 'Pretrained':
            model['init_cfg'] = None
        for value in model.values():
            without_weights(value)
    elif isinstance(model, (list, tuple)):
        for value in model:
            without_weights(value)
    return model


def build(cfg: Config, *, shared: bool = False) -> nn.Module:
    """Build the model as Runner does, weights off.

    With ``shared``, on the networks of the last one that was built so, where their configs are the same.
    """
    model = without_weights(cfg.model)
    # Runner hands the preprocessor at the top of mmseg's configs to whatever model it builds.
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if is_distilled(cfg):
        for teacher in teachers(model):
            if teacher.get('type', 'mmstructkd.FrozenTeacher') == 'mmstructkd.FrozenTeacher':
                teacher.update(checkpoint=None, allow_random=True)
            for step in teacher.get('route', ()):
                step['checkpoint'] = _random_weights(teacher.config)
    if shared:
        if model.get('data_preprocessor') is not None:
            model.student.setdefault('data_preprocessor', model.pop('data_preprocessor'))
        student, teacher = _pair(json.dumps(model.student), json.dumps(model.teacher))
        model.update(student=student, teacher=teacher)
    return MODELS.build(model)


def teachers(model: Any) -> list[Any]:
    """Return the configs of all teachers of a distiller."""
    return list(model.teachers.values()) if 'teachers' in model else [model.teacher]


@functools.cache
def _random_weights(config: str) -> str:
    """Write a checkpoint for a config, for teachers that cannot do without."""
    path = Path(tempfile.mkdtemp()) / 'random.pth'
    torch.save(MODELS.build(without_weights(Config.fromfile(config).model)).state_dict(), path)
    return str(path)


@functools.lru_cache(maxsize=1)
def _pair(student: str, teacher: str) -> tuple[nn.Module, TeacherSource]:
    """Build a student and the source of its teacher from their configs as JSON."""
    return MODELS.build(json.loads(student)), MODELS.build({'type': 'mmstructkd.FrozenTeacher', **json.loads(teacher)})


def optimiser(model: nn.Module, cfg: Config) -> OptimWrapper:
    """Build the optim wrapper as Runner does; a distiller asks for its own constructor there."""
    settings = copy.deepcopy(cfg.optim_wrapper)
    if is_distilled(cfg):
        base = settings.pop('constructor', 'DefaultOptimWrapperConstructor')
        settings.update(constructor='mmstructkd.DistillOptimWrapperConstructor', base_constructor=base)
    return build_optim_wrapper(model, settings)


def datasets(config: Any) -> list[Any]:
    """Return the configs of the plain datasets within a dataset's config."""
    if 'dataset' in config:
        return datasets(config.dataset)
    if 'datasets' in config:
        return [plain for part in config.datasets for plain in datasets(part)]
    return [config]


def parts(path: str) -> dict[str, str]:
    """Take the name of a config apart."""
    match = NAME.match(Path(path).stem)
    assert match, f'{path} is not named <networks>_<gpus>xb<batch>-<iterations>k_<dataset>-<crop>, or as a detector'
    return match.groupdict()


def crop(name: dict[str, str]) -> tuple[int, int] | None:
    """Return the size that a name states; detectors take whole images."""
    return None if name['h'] is None else (int(name['h']), int(name['w']))


@pytest.mark.parametrize('method', METHODS)
def test_every_pair_is_shipped(method):
    there = set()
    for path in NAMED:
        if path.startswith(f'configs/{method}/{method}_'):
            name = parts(path)
            networks = name['networks'].removeprefix(f'{method}_')
            there.add((networks, name['data'] + ('' if crop(name) is None else f'-{name["h"]}x{name["w"]}')))
    assert there >= PAIRS[method]


@pytest.mark.parametrize('folder', FAMILIES)
def test_every_method_of_a_family_is_shipped(folder):
    there = [Path(path).stem.split('_')[0] for path in CONFIGS if path.startswith(f'configs/{folder}/')]
    assert sorted(there) == sorted(FAMILIES[folder])


def test_every_loss_is_shipped():
    used = {term.loss.type for path in CONFIGS if is_distilled(cfg := read(path)) for term in cfg.model.terms.values()}
    assert {f'mmstructkd.{kind.__name__}' for kind in losses()} - used == set()


#: Weights of terms that are not the default of their loss: CWD's for class scores; published on another mean or beside
#: other terms. The files say which.
OTHER_WEIGHTS = {
    ('mgd', 'channel'): 3.0,
    ('reviewkd', 'review'): 4.0,
    ('srd', 'semantic'): 1.0,
    ('dist', 'auxiliary'): 0.4,
    ('icsd', 'pixel'): 0.5,
    ('gradient', 'edges'): 4.0,
    ('normals', 'normals'): 6.0,
    ('fgd', 'feature'): 5.0,
}


@pytest.mark.parametrize('path', FAMILY, ids=short)
def test_weights_are_the_defaults_of_the_losses(path):
    for name, term in read(path).model.terms.items():
        settings = {key: value for key, value in term.loss.items() if key != 'loss_weight'}
        usual = MODELS.build(settings).loss_weight
        assert term.loss.loss_weight == OTHER_WEIGHTS.get((Path(path).stem.split('_')[0], name), usual)


@pytest.mark.parametrize('path', DUMPED, ids=short)
def test_survives_a_dump(path, tmp_path):
    """The runner writes the config into the work directory; what it wrote must be the same config."""
    cfg = read(path)
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py')._cfg_dict.to_dict() == cfg._cfg_dict.to_dict()


@pytest.mark.parametrize('path', CONFIGS, ids=short)
def test_has_what_a_run_needs(path):
    cfg = read(path)
    assert cfg.default_scope in ('mmseg', 'mmdet')
    assert cfg.optim_wrapper.optimizer.lr > 0
    for loop in ('train', 'val', 'test'):
        assert cfg[f'{loop}_dataloader'].dataset, loop
        assert cfg[f'{loop}_cfg'], loop
    assert cfg.val_evaluator
    length = cfg.train_cfg.get('max_iters') or cfg.train_cfg.max_epochs
    assert length > 0
    last = cfg.param_scheduler[-1]
    assert last.end == length, 'the learning rate must reach its end with the training'
    assert last.by_epoch == cfg.default_hooks.checkpoint.get('by_epoch', True) == ('max_epochs' in cfg.train_cfg)
    assert cfg.default_hooks.checkpoint.interval <= length


@pytest.mark.parametrize('path', CONFIGS, ids=short)
def test_classes_are_those_of_the_data(path):
    cfg = read(path)
    # A head of class and turn together knows each class once a turn, of four.
    turns = {'mmstructkd.JointTurnHead': 4}
    found = [head.num_classes / turns.get(head.type, 1) for head in heads(network(cfg)) if 'num_classes' in head]
    # neither a depth head nor the proposals of a two-stage detector know classes
    assert found or network(cfg).type == 'DepthEstimator'
    for loop in ('train', 'val', 'test'):
        for config in datasets(cfg[f'{loop}_dataloader'].dataset):
            with DATASETS.switch_scope_and_registry(None) as registry:
                known = registry.get(config.type).METAINFO['classes']
            classes = config.get('metainfo', {}).get('classes') or known
            assert found == [len(classes)] * len(found), config.type


@pytest.mark.parametrize('path', [path for path in CONFIGS if 'depth' in path], ids=short)
def test_depth_has_one_unit(path):
    """The head reaches as far as what is scored, and padding is no reading."""
    cfg = read(path)
    model = network(cfg)
    assert model.type == 'DepthEstimator'
    assert model.data_preprocessor.seg_pad_val == 0
    assert cfg.val_evaluator.min_depth_eval > 0, '0 is no reading'
    assert model.decode_head.max_depth >= cfg.val_evaluator.max_depth_eval
    if is_distilled(cfg) and 'config' in cfg.model.teacher:
        teacher = read(beside(cfg.model.teacher.config)).model.decode_head
        assert (teacher.type, teacher.max_depth) == (model.decode_head.type, model.decode_head.max_depth)


#: mmrazor's weight of each level and the number of levels, which it adds up; a term takes their mean.
MMRAZOR = {
    'cwd_retinanet-r101_retinanet-r50': (10, 5),
    'cwd_gfl-r101_gfl-r50': (10, 5),
    'cwd_faster-rcnn-r101_faster-rcnn-r50': (10, 5),
    'pkd_faster-rcnn-r101_faster-rcnn-r50': (6, 4),
    'pkd_retinanet-x101_retinanet-r50': (10, 4),
    'pkd_fcos-x101_retinanet-r50': (10, 4),
    'pkd_mask-rcnn-swin-s_retinanet-r50': (6, 4),
    'pkd_reppoints-x101-dcn_reppoints-r50': (10, 4),
}


@pytest.mark.parametrize('path', [path for path in NAMED if re.search(r'/(cwd|pkd)/.*_coco\.py$', path)], ids=short)
def test_weights_are_those_of_mmrazor(path):
    (term,) = read(path).model.terms.values()
    weight, levels = MMRAZOR[parts(path)['networks']]
    assert term.loss.loss_weight == weight * levels
    tap = term.tap['student'] if isinstance(term.tap, dict) else term.tap
    assert tap == {5: 'neck[*]', 4: 'neck[:4]'}[levels]
    if '/cwd/' in path:
        assert term.loss.temperature == 1
    else:
        assert term.loss.preset == 'pkd'


@pytest.mark.parametrize('path', CONFIGS, ids=short)
def test_pipelines_build(path):
    cfg = read(path)
    for loop in ('train', 'val', 'test'):
        for config in datasets(cfg[f'{loop}_dataloader'].dataset):
            for transform in config.get('pipeline', ()):
                TRANSFORMS.build(transform)


@pytest.mark.parametrize('path', NAMED, ids=short)
def test_name_says_what_is_inside(path):
    cfg, name = read(path), parts(path)
    assert cfg.train_dataloader.batch_size == int(name['batch'])
    if name['thousands']:
        assert cfg.train_cfg.max_iters == 1000 * int(name['thousands'])
    else:
        assert cfg.train_cfg.max_epochs == int(name['epochs'])
    assert network(cfg).data_preprocessor.get('size') == crop(name)
    for config in datasets(cfg.train_dataloader.dataset):
        assert config.type == DATA_TYPES[name['data']]
        crops = [tuple(step.crop_size) for step in config.pipeline if step.type == 'RandomCrop']
        assert crops == ([] if crop(name) is None else [crop(name)])
    folder, stem = path.split('/')[1], Path(path).stem
    if folder in METHODS:
        assert stem.startswith(folder + '_')


@pytest.mark.parametrize('path', [path for path in NAMED if path.split('/')[1] in DISTILLED], ids=short)
def test_teacher_is_the_published_one(path):
    """The URL is that of the metafile next to the teacher's config, up to the host that serves it."""
    teacher = read(path).model.teacher
    library, _, config = teacher.config.rpartition('::')
    if not library:
        assert Path(teacher.config).is_file()
        # where tools/train.py puts the last checkpoint of that config
        steps = read(beside(teacher.config)).train_cfg.max_iters
        assert teacher.checkpoint == f'work_dirs/{Path(teacher.config).stem}/iter_{steps}.pth'
        return
    folder = config.split('/')[0]
    package, metafile, host = {
        'mmseg': (mmseg, 'metafile.yaml', '/mmsegmentation/'),
        'mmdet': (mmdet, 'metafile.yml', '/mmdetection/'),
    }[library]
    index = Path(package.__file__).parent / '.mim' / 'configs' / folder / metafile
    models = yaml.safe_load(index.read_text(encoding='utf-8'))['Models']
    weights = [model['Weights'] for model in models if model['Config'] == f'configs/{config}']
    assert [url.split(host)[1] for url in weights] == [teacher.checkpoint.split(host)[1]]


@pytest.mark.parametrize('folder', [*DISTILLED, 'plain'])
def test_metafile_lists_the_folder(folder):
    """`mim search` knows each config, and nothing else."""
    index = yaml.safe_load((ROOT / 'configs' / folder / 'metafile.yml').read_text(encoding='utf-8'))
    collections = {collection['Name']: collection for collection in index['Collections']}
    assert all((ROOT / collection['README']).is_file() for collection in collections.values())
    assert sorted(model['Config'] for model in index['Models']) == [
        path for path in CONFIGS if path.startswith(f'configs/{folder}/')
    ]
    for model in index['Models']:
        name, meta = parts(model['Config']), model['Metadata']
        assert model['Name'] == Path(model['Config']).stem
        assert model['In Collection'] in collections
        assert meta['Batch Size'] == int(name['gpus']) * int(name['batch'])
        assert meta.get('Iterations') == (1000 * int(name['thousands']) if name['thousands'] else None)
        assert meta.get('Epochs') == (int(name['epochs']) if name['epochs'] else None)
        assert meta.get('Crop') == (f'{name["h"]}x{name["w"]}' if crop(name) else None)


@pytest.mark.parametrize('folder', [*DISTILLED, 'plain'])
def test_readme_links_every_config(folder):
    text = (ROOT / 'configs' / folder / 'README.md').read_text(encoding='utf-8')
    links = {link for link in re.findall(r'\]\(([^)]+)\)', text) if link.endswith('.py')}
    assert sorted(f'configs/{folder}/{link}' for link in links) == [
        path for path in CONFIGS if path.startswith(f'configs/{folder}/')
    ]


def check_built(model: nn.Module, cfg: Config) -> None:
    """Check terms and optimiser of a model that was just built."""
    wrapper = optimiser(model, cfg)
    optimised = [id(p) for group in wrapper.optimizer.param_groups for p in group['params']]
    assert len(optimised) == len(set(optimised))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained <= set(optimised)
    if not is_distilled(cfg):
        return
    assert list(model.terms) == list(cfg.model.terms)
    for term in model.terms.values():
        # What reads queries brings them to the student's grid itself.
        levels = [level for level in term.levels if level.connector != 'QueryMarginals']
        assert all(level.student[2:] == level.teacher[2:] for level in levels), 'maps of one stride'
    assert list(model.state_dict()) == list(model.student.state_dict())


@pytest.mark.parametrize('path', [path for path in CONFIGS if path not in FAMILY], ids=short)
def test_builds(path):
    """The probe resolves each term; each trained parameter is in the optimiser once, the teacher's never."""
    cfg = read(path)
    model = build(cfg)
    check_built(model, cfg)
    if is_distilled(cfg):
        assert list(model.student.state_dict()) == list(MODELS.build(network(cfg)).state_dict())


OF_KINDS = [path for path in CONFIGS if path.startswith('configs/teachers/')]


@pytest.mark.parametrize('path', OF_KINDS, ids=short)
def test_a_kind_of_teacher_trains_and_takes_few_lines(path):
    """One optimiser step of what the file says, and at most 15 lines of its own."""
    cfg = read(path)
    torch.manual_seed(0)
    model = build(cfg).train()
    model.set_progress(0, cfg.train_cfg.max_iters)
    wrapper = optimiser(model, cfg)
    given = synthetic_batch(model, (64, 64))
    if model.streams.reading:
        given['unlabelled'] = synthetic_batch(model, (64, 64))
    total, logs = model.parse_losses(model(**given, mode='loss'))
    wrapper.update_params(total)
    assert total.isfinite()
    for name, term in cfg.model.terms.items():
        on = term.get('on', 'labelled')
        for stream in [on] if isinstance(on, str) else on:
            assert f'loss_kd_{name}' + ('' if stream == 'labelled' else f'_{stream}') in logs
    lines = (ROOT / path).read_text(encoding='utf-8').splitlines()
    frame = ('_base_', 'model = dict(', '    _delete_', "    type='mmstructkd.StructuredDistiller'", '    student=')
    own = [line for line in lines if line.strip() and not line.startswith(('#', *frame))]
    assert len(own) <= 15


def test_the_page_of_kinds_names_every_config():
    text = (ROOT / 'configs' / 'teachers' / 'README.md').read_text(encoding='utf-8')
    links = set(re.findall(r'\]\(([^)]+\.py)\)', text))
    assert sorted(f'configs/teachers/{link}' for link in links) == OF_KINDS


@pytest.mark.parametrize('path', FAMILY, ids=short)
def test_family_builds(path):
    """As above; the networks are shared, the terms are built and tried by the probe for each."""
    cfg = read(path)
    check_built(build(cfg, shared=True), cfg)


def batch(size: tuple[int, int], classes: int) -> dict[str, Any]:
    """Two noisy images with noisy labels, a quarter of them ignored, as a data loader hands them out."""
    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for _ in range(2):
        inputs.append(torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8))
        labels = torch.randint(0, classes, (1, *size), generator=generator)
        labels[:, : size[0] // 4] = 255
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, padding_size=[0] * 4))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


@pytest.mark.parametrize(
    'path',
    [
        'configs/structkd/structkd_pspnet-r101-d8_pspnet-r18-d8_1xb8-20k_camvid-360x480.py',
        'configs/cwd/cwd_segformer-b4_segformer-b0_8xb1-160k_cityscapes-1024x1024.py',
    ],
    ids=short,
)
def test_one_step(path):
    """One optimiser step on a tiny batch: each term is finite and the student moves."""
    cfg = read(path)
    size = (64, 64)
    network(cfg).data_preprocessor['size'] = size
    if cfg.get('data_preprocessor') is not None:
        cfg.data_preprocessor['size'] = size
    torch.manual_seed(0)
    model = build(cfg)
    model.train()
    wrapper = optimiser(model, cfg)
    before = {name: value.clone() for name, value in model.student.named_parameters()}
    logs = model.train_step(batch(size, network(cfg).decode_head.num_classes), wrapper)
    for name in cfg.model.terms:
        assert torch.isfinite(logs[f'loss_kd_{name}']), name
    moved = [name for name, value in model.student.named_parameters() if not torch.equal(before[name], value)]
    assert 'decode_head.conv_seg.weight' in moved


@pytest.mark.parametrize(
    ('path', 'moves'),
    [
        ('configs/structkd/structkd_depth-fpn-r101_depth-fpn-r18_4xb4-40k_kitti-352x704.py', 'decode_head.conv_depth.'),
        ('configs/structkd/structkd_fcos-r101_fcos-mobilenet-v2_8xb2-12e_coco.py', 'bbox_head.conv_cls.'),
        ('configs/structkd/structkd_faster-rcnn-r101_faster-rcnn-r50_8xb2-24e_coco.py', 'roi_head.bbox_head.fc_cls.'),
    ],
    ids=short,
)
def test_one_step_of_other_tasks(path, moves):
    """As above, for depth, a one-stage and a two-stage detector."""
    cfg = read(path)
    size = (64, 96)
    for holder in (network(cfg), cfg):
        if (holder.get('data_preprocessor') or {}).get('size'):
            holder.data_preprocessor['size'] = size
    torch.manual_seed(0)
    model = build(cfg)
    model.train()
    wrapper = optimiser(model, cfg)
    before = {name: value.clone() for name, value in model.student.named_parameters()}
    total, logs = model.parse_losses(model(**synthetic_batch(model, size), mode='loss'))
    wrapper.update_params(total)
    for name in cfg.model.terms:
        assert torch.isfinite(logs[f'loss_kd_{name}']), name
    moved = [name for name, value in model.student.named_parameters() if not torch.equal(before[name], value)]
    assert {f'{moves}weight', f'{moves}bias'} <= set(moved)


def test_page_on_own_models_works_as_written(tmp_path, monkeypatch):
    """The config and the schedule of docs/distil_your_own.md, beside a small student and a small teacher."""
    text = (ROOT / 'docs' / 'distil_your_own.md').read_text(encoding='utf-8')
    blocks = re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL)
    (distilled,) = [block for block in blocks if block.startswith('_base_')]
    (schedule,) = [block for block in blocks if block.startswith('pixel = dict(')]

    student = read('configs/plain/pspnet_r18-d8_1xb8-20k_camvid-360x480.py')
    without_weights(student.model)
    student.model.decode_head.channels = 16
    student.model.auxiliary_head.channels = 8
    student.dump(tmp_path / 'my_student.py')
    student.model.decode_head.channels = 32
    student.dump(tmp_path / 'my_teacher.py')
    torch.save({'state_dict': MODELS.build(student.model).state_dict()}, tmp_path / 'my_teacher.pth')

    # its neighbours are named by its own folder, not by where the command is run
    monkeypatch.chdir(ROOT)
    path = tmp_path / 'my_distilled.py'
    path.write_text(distilled, encoding='utf-8')
    model = MODELS.build(Config.fromfile(path).model)
    assert list(model.terms) == ['pixel', 'pairwise']

    namespace: dict[str, Any] = {}
    exec(schedule, namespace)
    path.write_text(f"{distilled}\nmodel['terms']['pixel'] = {namespace['pixel']!r}\n", encoding='utf-8')
    term = MODELS.build(Config.fromfile(path).model).terms['pixel']
    assert term.schedule.factor(0, 80000) == 1.0
    assert term.schedule.factor(40000, 80000) == 0.0


def test_configs_of_the_readme_build(tmp_path):
    """Both, one of mmseg and one of mmdet, as they are printed; weights off."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    blocks = [
        block for block in re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL) if block.startswith('_base_')
    ]
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        path = tmp_path / f'readme_{number}.py'
        path.write_text(block, encoding='utf-8')
        cfg = Config.fromfile(path)
        init_default_scope(cfg.default_scope)
        model = build(cfg)
        assert list(model.terms) == list(cfg.model.terms)
