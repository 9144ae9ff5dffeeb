"""``tools/draw.py``: a column for each checkpoint, for all three tasks."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from mmstructkd.teachers.loading import build_network
from mmstructkd.testing import toy_config, toy_depth_estimator, toy_detector, toy_distiller, toy_segmentor

NETWORKS = {'seg': toy_segmentor, 'depth': toy_depth_estimator, 'det': lambda: toy_detector('gfl')}


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('draw')


@pytest.fixture
def written(tmp_path):
    """Write a config and a random checkpoint; return their paths."""

    def write(task, model=None, name='toy_network', width=None):
        torch.manual_seed(len(list(tmp_path.iterdir())))
        cfg = toy_config(NETWORKS[task]() if model is None else model, tmp_path, task=task)
        config, checkpoint = tmp_path / f'{name}_{task}.py', tmp_path / f'{name}_{task}.pth'
        cfg.dump(config)
        plain = cfg.model.get('student', cfg.model)
        network = build_network(dict(model=plain, default_scope=cfg.default_scope), 'test')
        torch.save(dict(state_dict=network.state_dict()), checkpoint)
        return str(config), str(checkpoint)

    return write


@pytest.mark.parametrize('task', NETWORKS)
def test_picture_has_a_column_for_each(tool, written, tmp_path, capsys, task):
    first, second = written(task), written(task, name='other')
    out = tmp_path / 'deep' / 'picture.png'
    options = ['--samples', '2', '--width', '96', '--score-threshold', '0']
    assert tool.main([*first, *second, '--out', str(out), *options]) == 0
    picture = cv2.imread(str(out))
    assert picture.shape[1] == 6 + 4 * (96 + 6)
    assert picture.shape[0] > 24 + 2 * (72 + 6)
    assert '2 of 8 validation images' in capsys.readouterr().out
    assert tool.main([*first, '--out', str(out), *options, '--cfg-options', 'val_dataloader.dataset.num_scenes=1']) == 0
    assert cv2.imread(str(out)).shape[1] == 6 + 3 * (96 + 6)
    assert '1 of 1 validation images' in capsys.readouterr().out


def test_distilled_config_is_drawn_as_its_student(tool, written, tmp_path):
    """Its teacher's checkpoint is not looked for."""
    distilled = toy_distiller(teacher=dict(config=toy_segmentor(8), checkpoint='not/there.pth'))
    config, checkpoint = written('seg', distilled, name='distilled')
    plain, _ = written('seg')
    for number, source in enumerate((config, plain)):
        options = ['--out', str(tmp_path / f'{number}.png'), '--samples', '1', '--titles', 'student']
        assert tool.main([source, checkpoint, *options]) == 0
    assert np.array_equal(cv2.imread(str(tmp_path / '0.png')), cv2.imread(str(tmp_path / '1.png')))


def test_one_config_with_two_checkpoints(tool, written, tmp_path):
    config, checkpoint = written('seg')
    out = tmp_path / 'picture.png'
    assert tool.main([config, checkpoint, config, checkpoint, '--out', str(out), '--samples', '1']) == 0
    assert cv2.imread(str(out)).shape[1] == 6 + 4 * (256 + 6)


def test_given_range_of_depth_is_used(tool, written, tmp_path):
    pair, out = written('depth'), [tmp_path / f'{number}.png' for number in range(2)]
    for path, far in zip(out, ('10', '20'), strict=True):
        assert tool.main([*pair, '--out', str(path), '--samples', '1', '--depth-range', '1', far]) == 0
    assert not np.array_equal(cv2.imread(str(out[0])), cv2.imread(str(out[1])))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['a.py', '--out', 'x.png'], 'each config must have its checkpoint, got 1 paths'),
        (['a.py', 'a.pth', '--out', 'x.gif'], "must end in .png or .jpg, got 'x.gif'"),
        (['a.py', 'a.pth', '--out', 'x.png', '--samples', '0'], '`--samples` must be at least 1, got 0'),
        (['a.py', 'a.pth', '--out', 'x.png', '--titles', 'a', 'b'], 'one for each of 1 configs, got 2'),
        (['a.py', 'a.pth', '--out', 'x.png', '--score-threshold', 'nan'], 'a finite number, got nan'),
    ],
)
def test_bad_arguments_are_refused(tool, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tool.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_mistakes_end_with_a_message(tool, written, tmp_path, capsys):
    seg, depth, out = written('seg'), written('depth'), ['--out', str(tmp_path / 'picture.png')]
    assert tool.main([*seg, *depth, *out]) == 1
    assert "must share one task, got ['depth', 'seg']" in capsys.readouterr().err
    assert tool.main([seg[0], depth[1], *out]) == 1
    assert 'unexpected: decode_head.conv_depth.weight' in capsys.readouterr().err
    assert tool.main(['not_there.py', seg[1], *out]) == 1
    assert "must be a readable config, got 'not_there.py'" in capsys.readouterr().err
    assert tool.main([*depth, *out, '--depth-range', '5', '1']) == 1
    assert 'above 0 and upwards, got (5.0, 1.0)' in capsys.readouterr().err
    assert not (tmp_path / 'picture.png').exists()


def test_samples_are_spread_over_the_dataset(tool):
    assert tool.spread_evenly(4, 200) == [0, 50, 100, 150]
    assert tool.spread_evenly(4, 3) == [0, 1, 2]


def test_long_names_are_broken_at_underscores(tool):
    title = tool.title_of('configs/cwd_upernet_r18-w32_upernet_r18-w8_300_scenes-128x128.py')
    assert title.replace('\n', '_') == 'cwd_upernet_r18-w32_upernet_r18-w8_300_scenes-128x128'
    assert all(len(line) <= 30 for line in title.split('\n'))
    assert len(title.split('\n')) == 2
