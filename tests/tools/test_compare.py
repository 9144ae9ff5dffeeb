"""``tools/compare.py`` with several metrics; finished runs are read, not run again."""

from __future__ import annotations

import json
import sys

import pytest

ROWS = {
    'alone': [dict(abs_rel=0.30, rmse=2.0, d1=0.5), dict(abs_rel=0.32, rmse=2.2, d1=0.4)],
    'kd': [dict(abs_rel=0.25, rmse=1.9, d1=0.6), dict(abs_rel=0.29, rmse=2.3, d1=0.7)],
}


@pytest.fixture
def compare(load_tool, tmp_path, monkeypatch, capsys):
    """Write finished runs, call the tool, and return its table and what it printed."""
    tool = load_tool('compare')

    def call(*arguments, runs=ROWS, rest=''):
        for name, seeds in runs.items():
            for seed, values in enumerate(seeds):
                log = tmp_path / f'{name}_seed{seed}' / '20260101_000000' / 'vis_data' / 'scalars.json'
                log.parent.mkdir(parents=True, exist_ok=True)
                entries = [dict(loss=1.0, time=0.5), dict.fromkeys(values, 9.0), values]
                log.write_text('\n'.join(map(json.dumps, entries)) + '\n' + rest)
                (tmp_path / f'{name}_seed{seed}' / 'done').touch()
        arms = [word for name in runs for word in ('--arm', f'{name}={name}.py')]
        options = ['--seeds', '0', '1', '--work-dir', str(tmp_path), '--out', str(tmp_path / 'table')]
        monkeypatch.setattr(sys, 'argv', ['compare.py', *arms, *options, *arguments])
        tool.main()
        return (tmp_path / 'table.md').read_text().splitlines(), capsys.readouterr().out

    return call


def test_each_metric_has_its_mean_and_its_paired_difference(compare, tmp_path):
    lines, shown = compare('--metric', 'abs_rel', 'rmse', 'd1', '--percent', 'd1')
    assert lines == [
        '| arm | abs_rel seed 0 | abs_rel seed 1 | abs_rel | paired difference | rmse | paired difference '
        '| d1 | paired difference | s a step |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
        '| alone | 0.300 | 0.320 | 0.310 ± 0.014 |  | 2.100 ± 0.141 |  | 45.00 ± 7.07 |  | 0.50 |',
        '| kd | 0.250 | 0.290 | 0.270 ± 0.028 | -0.040 ± 0.014 | 2.100 ± 0.283 | +0.000 ± 0.141 '
        '| 65.00 ± 7.07 | +20.00 ± 14.14 | 0.50 |',
    ]
    assert 'kd seed 1: abs_rel 0.290, rmse 2.300, d1 70.00, 0.50 s a step' in shown
    numbers = json.loads((tmp_path / 'table.json').read_text())
    assert numbers['kd']['1'] == dict(abs_rel=0.29, rmse=2.3, d1=70.0, step_seconds=0.5)


def test_average_precision_in_per_cent(compare):
    runs = {'alone': [{'coco/bbox_mAP': 0.105}, {'coco/bbox_mAP': 0.125}]}
    lines, _ = compare('--metric', 'coco/bbox_mAP', '--percent', runs=runs)
    assert lines[0] == '| arm | seed 0 | seed 1 | mean coco/bbox_mAP | std | paired difference | s a step |'
    assert lines[2] == '| alone | 10.50 | 12.50 | 11.50 | 1.41 | +0.00 | 0.50 |'


def test_half_written_line_does_no_harm(compare):
    lines, _ = compare('--metric', 'abs_rel', 'rmse', rest='{"abs_rel": 0.9')
    assert lines[3].startswith('| kd | 0.250 | 0.290 |')


def test_metric_that_is_not_logged_is_named(compare):
    with pytest.raises(SystemExit, match=r"no 'mIoU' in the logs of .*alone_seed0, only \['abs_rel', 'd1', 'rmse'\]"):
        compare('--metric', 'abs_rel', 'mIoU')


def test_per_cent_of_what_is_not_shown_is_refused(compare, capsys):
    with pytest.raises(SystemExit):
        compare('--metric', 'abs_rel', '--percent', 'd1')
    assert "must name metrics of --metric ['abs_rel'], got ['d1']" in capsys.readouterr().err
