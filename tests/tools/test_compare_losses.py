"""``tools/compare_losses.py``: every loss has its term, finished runs are read, and the page is laid out."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmstructkd import compat
from mmstructkd.registry import MODELS
from mmstructkd.tasks.batches import synthetic_batch

RUNS = {'student_alone': (20.0, 0.5), 'ChannelwiseKLLoss': (27.5, 0.75), 'DistLoss': (19.0, 0.6)}


@pytest.fixture(scope='module')
def tool(load_tool):
    compat.install()
    return load_tool('compare_losses')


@pytest.fixture
def compare(tool, tmp_path, monkeypatch):
    """Call the tool with trainings that write what is in ``RUNS`` at once; return the exit code and the commands."""
    commands = []
    (tmp_path / 'teacher.pth').touch()

    def start(command, **_):
        folder = tmp_path / 'runs' / command[command.index('--work-dir') + 1].rsplit('/', 1)[-1]
        commands.append(command)
        (folder / Path(command[2]).name).write_text('what the runner made of it')
        miou, seconds = RUNS.get(folder.name, (None, None))
        if miou is None:
            return subprocess.CompletedProcess(command, 1)
        log = folder / '20260101_000000' / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text('\n'.join(map(json.dumps, [dict(loss=1.0, time=seconds), dict(mIoU=miou)])) + '\n')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(tool.subprocess, 'run', start)

    def call(*arguments):
        commands.clear()
        paths = ['--teacher', tmp_path / 'teacher.pth', '--work-dir', tmp_path / 'runs', '--out', tmp_path / 'page.md']
        return tool.main([str(a) for a in (*paths, *arguments)]), list(commands)

    return call


def test_every_loss_for_segmentation_is_shipped(tool):
    assert tool.losses() == sorted(tool.SHIPPED)


def test_every_term_trains_on_this_pair(tool):
    """All of them in one distiller, for one backward pass on noise."""
    init_default_scope('mmseg')
    cfg = Config.fromfile(tool.CONFIGS / tool.STUDENT)
    runs = [tool.run_of(name) for name in tool.losses()]
    model = MODELS.build(
        dict(
            type='mmstructkd.StructuredDistiller',
            student=cfg.model,
            teacher=dict(config=str(tool.CONFIGS / tool.TEACHER), allow_random=True),
            terms={run.name: run.term for run in runs},
        )
    )
    for run in runs:
        term = model.terms[run.name]
        assert type(term.loss).__name__ == run.name
        assert term.loss.loss_weight == run.weight > 0
    model.train()
    found = model(**synthetic_batch(model, (60, 80)), mode='loss')
    for run in runs:
        assert found[f'loss_kd_{run.name}'].isfinite(), run.name
        assert found[f'loss_kd_{run.name}'].requires_grad, run.name
    model.parse_losses(found)[0].backward()
    assert all(p.grad.isfinite().all() for p in model.student.parameters() if p.grad is not None)
    assert model.student.decode_head.conv_seg.weight.grad is not None


def test_table_is_sorted_and_relative_to_the_student_alone(compare, tmp_path, capsys):
    (tmp_path / 'page.md').write_text('old\n')
    code, commands = compare('--only', 'DistLoss', 'ChannelwiseKLLoss', '--iterations', '7', '--seed', '3')
    assert code == 0
    assert len(commands) == 3
    page = (tmp_path / 'page.md').read_text()
    assert [line for line in page.splitlines() if line.startswith('|')] == [
        '| loss | weight | tap (student / teacher) | mIoU | difference | s a step | ratio |',
        '| --- | --- | --- | --- | --- | --- | --- |',
        '| `ChannelwiseKLLoss` | 1 | `decode_head.conv_seg` | 27.50 | +7.50 | 0.750 | 1.50 |',
        '| student alone |  |  | 20.00 |  | 0.500 |  |',
        '| `DistLoss` | 1 | `decode_head.conv_seg` | 19.00 | -1.00 | 0.600 | 1.20 |',
    ]
    assert 'One seed, 7 iterations: differences of a few points are chance' in page
    assert 'python tools/compare_losses.py --iterations 7 --seed 3\n' in page
    assert str(tmp_path) not in page
    assert 'old' not in page
    assert 'DistLoss: mIoU 19.00, 0.600 s a step' in capsys.readouterr().out


def test_finished_runs_are_not_run_again_and_what_was_added_stays(compare, tool, tmp_path):
    compare('--only', 'DistLoss')
    with (tmp_path / 'page.md').open('a') as page:
        page.write('\nWhat was learnt.\n')
    code, commands = compare('--only', 'DistLoss')
    assert (code, commands) == (0, [])
    assert (tmp_path / 'page.md').read_text().endswith(f'{tool.MARK}\n\nWhat was learnt.\n')


def test_a_loss_that_fails_is_named_and_the_rest_goes_on(compare, tmp_path, capsys):
    code, commands = compare('--only', 'AttentionTransferLoss', 'DistLoss')
    assert (code, len(commands)) == (1, 3)
    assert '| `DistLoss` |' in (tmp_path / 'page.md').read_text()
    assert 'Failed: AttentionTransferLoss.' in (tmp_path / 'page.md').read_text()
    assert 'failed: AttentionTransferLoss' in capsys.readouterr().err


def test_config_of_a_run(compare, tmp_path):
    compare('--only', 'AttentionTransferLoss', '--iterations', '70', '--batch', '2', '--seed', '4')
    cfg = Config.fromfile(tmp_path / 'runs' / 'AttentionTransferLoss.py')
    assert (cfg.randomness.seed, cfg.train_dataloader.batch_size, cfg.train_cfg.max_iters) == (4, 2, 70)
    assert [(step.begin, step.end) for step in cfg.param_scheduler] == [(0, 17), (17, 70)]
    assert cfg.model.student.type == 'EncoderDecoder'
    assert cfg.model.teacher.checkpoint == str(tmp_path / 'teacher.pth')
    assert cfg.model.terms.to_dict() == dict(
        loss=dict(
            tap=dict(student='decode_head.convs', teacher='decode_head.bottleneck'),
            loss=dict(type='mmstructkd.AttentionTransferLoss'),
        )
    )


def test_runs_of_other_settings_are_not_mixed(compare):
    compare('--only', 'DistLoss')
    with pytest.raises(SystemExit, match='must hold runs of the same settings, got others in .*student_alone.py'):
        compare('--only', 'DistLoss', '--iterations', '9')


def test_only_names_losses(compare, capsys):
    with pytest.raises(SystemExit):
        compare('--only', 'FocalGlobalLoss')
    assert "must name registered losses that serve segmentation, got ['FocalGlobalLoss']" in capsys.readouterr().err
