"""The frozen teacher: loading in full or not at all, its own normalisation, and no more work than needed."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmstructkd.distillers import FrozenTeacher
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.taps import Tap
from mmstructkd.teachers.loading import build_network, file_hash
from mmstructkd.testing import toy_batch, toy_distiller, toy_segmentor


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """Checkpoint of a toy segmentor of width 8."""
    network = build_network(toy_segmentor(8), 'test')
    path = tmp_path / 'teacher.pth'
    torch.save({'state_dict': network.state_dict(), 'meta': {'epoch': 1}}, path)
    return str(path)


def test_loads_every_parameter(weights: str) -> None:
    teacher = FrozenTeacher(toy_segmentor(8), weights)
    saved = torch.load(weights, weights_only=True)['state_dict']
    assert all(torch.equal(v, saved[k]) for k, v in teacher.network.state_dict().items())
    assert teacher.provenance()['sha256'] == file_hash(weights)
    assert teacher.provenance()['checkpoint'] == weights


def test_reads_a_config_file_and_what_ddp_saved(weights: str, tmp_path: Path) -> None:
    config = tmp_path / 'teacher.py'
    Config(dict(default_scope='mmseg', model=toy_segmentor(8, pretrained='open-mmlab://resnet18_v1c'))).dump(config)
    saved = torch.load(weights, weights_only=True)['state_dict']
    torch.save({f'module.{k}': v for k, v in saved.items()}, weights)
    teacher = FrozenTeacher(str(config), weights)
    assert torch.equal(teacher.network.state_dict()['decode_head.conv_seg.bias'], saved['decode_head.conv_seg.bias'])


def test_a_distilled_checkpoint_and_its_config_make_a_teacher(weights: str, tmp_path: Path) -> None:
    config = tmp_path / 'distilled.py'
    Config(dict(default_scope='mmseg', model=toy_distiller(student=toy_segmentor(8)))).dump(config)
    assert type(FrozenTeacher(str(config), weights).network).__name__ == 'EncoderDecoder'


def test_says_everything_that_does_not_fit(weights: str) -> None:
    saved = torch.load(weights, weights_only=True)['state_dict']
    saved.pop('decode_head.conv_seg.bias')
    saved['neck.weight'] = torch.zeros(2, 3)
    torch.save(saved, weights)
    with pytest.raises(CheckpointError) as info:
        FrozenTeacher(toy_segmentor(8, num_classes=5), weights)
    text = str(info.value)
    assert '2 missing' in text or '1 missing' in text
    assert 'missing: decode_head.conv_seg.bias (5,)' in text
    assert 'unexpected: neck.weight (2, 3)' in text
    assert 'shape: decode_head.conv_seg.weight is (10, 16, 1, 1), must be (5, 16, 1, 1)' in text
    assert 'The checkpoint has 10 classes, the config num_classes=5' in text
    teacher = FrozenTeacher(toy_segmentor(8, num_classes=5), weights, allow_random=True)
    assert torch.equal(teacher.network.state_dict()['backbone.stem.0.weight'], saved['backbone.stem.0.weight'])


def test_a_checkpoint_is_needed() -> None:
    with pytest.raises(ConfigError, match='`checkpoint` must name the weights of the teacher, got None'):
        FrozenTeacher(toy_segmentor(8))


class Payload:
    """Runs code when it is read."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ('should-not-be-there',)


def malicious() -> bytes:
    """A checkpoint whose reading would make a folder."""
    file = io.BytesIO()
    torch.save({'state_dict': {}, 'x': Payload()}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, 'missing.pth'),
        (b'', 'file.pth'),
        (b'PK\x03\x04 cut short', 'file.pth'),
        (malicious(), 'mkdir.*trust_checkpoint=True'),
    ],
    ids=['missing', 'empty', 'truncated', 'malicious'],
)
def test_bad_files(content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ('missing.pth' if content is None else 'file.pth')
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        FrozenTeacher(toy_segmentor(8), str(path))
    assert not (tmp_path / 'should-not-be-there').exists()


def test_bad_configs(weights: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='must be a readable config'):
        FrozenTeacher('no/such/config.py', weights)
    with pytest.raises(ConfigError, match='must define `model`'):
        FrozenTeacher(dict(modle=toy_segmentor(8)), weights)
    with pytest.raises(ConfigError, match='must be a path'):
        FrozenTeacher(3, weights)


OTHER = dict(mean=[10.0, 20.0, 30.0], std=[2.0, 3.0, 4.0], bgr_to_rgb=False)


CHANGES = [{}, OTHER, dict(OTHER, bgr_to_rgb=True), dict(mean=None, std=None), dict(OTHER, pad_val=7)]


@pytest.mark.parametrize('changes', CHANGES)
def test_the_teacher_sees_its_own_normalisation(changes: dict) -> None:
    """The batch it gets is what its own preprocessor makes of the images, padding included."""
    config = toy_segmentor(8)
    config.data_preprocessor.update(changes)
    teacher, student = FrozenTeacher(config, allow_random=True), MODELS.build(toy_segmentor(4))
    teacher.attach(student)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in ((48, 64), (30, 50))]

    def batch(preprocessor: torch.nn.Module) -> dict:
        samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, *i.shape[1:]).long())) for i in images]
        return preprocessor(dict(inputs=images, data_samples=samples), True)

    given = batch(student.data_preprocessor)
    expected = batch(teacher.network.data_preprocessor)['inputs']
    converted = teacher._convert(given['inputs'], given['data_samples'])
    assert torch.allclose(converted, expected, atol=1e-4)
    if not changes:
        assert converted is given['inputs']


def test_runs_no_further_than_the_deepest_tap() -> None:
    terms = dict(a=dict(tap='backbone[1]', loss=dict(type='mmstructkd.PairwiseAffinityLoss')))
    model = MODELS.build(toy_distiller(terms=terms)).train()
    reached = []
    network = model.teacher.network
    for name, module in network.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: reached.append(name))
    network.loss = network.decode_head.loss = None  # calling them would fail
    model(**toy_batch(), mode='loss')
    assert 'backbone' in reached
    assert not any(name.startswith(('decode_head', 'auxiliary_head')) for name in reached)


def test_dropout_and_batch_norm_of_the_teacher_are_off() -> None:
    teacher = FrozenTeacher(toy_segmentor(8), allow_random=True)
    teacher.attach(MODELS.build(toy_segmentor(4)))
    tap = Tap.parse('decode_head.conv_seg')
    batch = toy_batch()
    teacher.probe(batch['inputs'], None, [tap])
    first, second = (teacher.observe(batch['inputs'], None, [tap])[tap][0] for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad


def test_reads_a_config_of_the_package() -> None:
    teacher = FrozenTeacher('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', allow_random=True)
    assert teacher.network.decode_head.num_classes == 19
    assert teacher.provenance()['config'].startswith('mmseg::')
    with pytest.raises(ConfigError, match='must be a readable config'):
        FrozenTeacher('mmseg::pspnet/no_such_config.py', allow_random=True)
