"""The benchmark: it runs, its arms do the same work, its plain losses compute the same, and what it prints follows."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mmstructkd import functional
from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_distiller, toy_segmentor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def load() -> Callable[[str], ModuleType]:
    """Import a module of ``tools/`` by its name, as the script finds it."""
    sys.path.insert(0, str(ROOT / 'tools'))
    yield importlib.import_module
    sys.path.remove(str(ROOT / 'tools'))


@pytest.fixture(scope='module')
def quick(load: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Quick runs: one pair in every arm, and the others in three."""
    folder = tmp_path_factory.mktemp('quick')
    common = ['--quick', '--rounds', '1', '--warmup', '1', '--out']
    names = list(load('benchmark_pairs').pairs())
    assert load('benchmark').main([*common, str(folder / 'arms'), '--pairs', 'pspnet_cwd']) == 0
    others = ['--pairs', *names[1:], '--arms', 'student alone', 'mmstructkd', 'mmrazor']
    assert load('benchmark').main([*common, str(folder / 'pairs'), *others]) == 0
    assert all((folder / name / 'pairs_cpu.png').stat().st_size > 1000 for name in ('arms', 'pairs'))
    return lambda name: json.loads((folder / name / 'pairs_cpu.json').read_text())


@pytest.mark.parametrize('run', ['arms', 'pairs'])
def test_every_pair_is_timed_in_every_arm(run: str, quick: Callable, load: Callable) -> None:
    arms = load('benchmark_pairs')
    results = quick(run)
    expected = {*arms.ARMS} - {*arms.COMPILED} if run == 'arms' else {arms.STUDENT, arms.OURS, arms.MMRAZOR}
    for entry in results['pairs']:
        assert {*entry['arms'], *entry['skipped']} == expected
        assert expected - {arms.MMRAZOR} <= {*entry['arms']}
        assert entry['terms']['median'] > 0
        for name, arm in entry['arms'].items():
            assert 0 < arm['low'] <= arm['median'] <= arm['high']
            assert arm['held_bytes'] > 0
            assert arm['extra_bytes'] > 0
            assert ('teacher' in arm) == (name != arms.STUDENT)
            assert all(torch.tensor(value).isfinite() for value in arm['losses'].values()), name


@pytest.mark.parametrize('run', ['arms', 'pairs'])
def test_arms_train_the_same_student_on_the_same_batch(run: str, quick: Callable) -> None:
    for entry in quick(run)['pairs']:
        losses = {name: arm['losses'] for name, arm in entry['arms'].items()}
        task = {key for key in losses['student alone'] if 'loss' in key and key != 'loss'}
        distilled = {key for key in losses['mmstructkd'] if key.startswith('loss_kd')}
        for name, found in losses.items():
            for key in task:
                value = found.get(key, found.get(f'student.{key}'))
                assert value == pytest.approx(losses['student alone'][key], rel=1e-5), (entry['pair'], name, key)
            if name in ('student alone', 'student + teacher forward'):
                continue
            if name == 'mmrazor':
                theirs = sum(value for key, value in found.items() if key.startswith('distill.'))
                assert theirs == pytest.approx(losses['mmstructkd']['loss_kd_channelwise'], rel=1e-3)
                continue
            for key in distilled:
                factor = 4 if name == 'every=4' else 1
                assert found[key] == pytest.approx(factor * losses['mmstructkd'][key], rel=0.05, abs=1e-4), (name, key)


def test_a_missing_mmrazor_is_one_line(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    mmrazor = load('benchmark_mmrazor')
    mmrazor.available.cache_clear()
    monkeypatch.setattr(mmrazor.importlib.util, 'find_spec', lambda name: None)
    assert mmrazor.available() == 'mmrazor is not installed (see the head of tools/benchmark_mmrazor.py)'
    mmrazor.available.cache_clear()


def test_plain_losses_compute_the_same(load: Callable) -> None:
    losses = load('benchmark_losses')
    for name, case in losses.CASES.items():
        found = losses.measure(name, case.sizes[0], device='cpu', rounds=1, warmup=0)
        assert found['value_differs'] < 1e-3, name
        assert found['gradient_differs'] < 1e-3, name
        assert found['ours']['extra_bytes'] > 0, name


def test_no_loss_is_left_out(load: Callable) -> None:
    """But those of critics, and those whose plain form is the form itself."""
    losses = {name for name in functional.__all__ if name.endswith('_loss')}
    left = {'adversarial_loss', 'critic_loss', 'wasserstein_contrast_loss', 'sinkhorn_loss'}
    left |= {'blended_cross_entropy_loss', 'blended_feature_loss', 'bridge_loss', 'covariance_loss'}
    left |= {'cross_entropy_loss', 'local_learning_loss', 'residual_loss', 'variance_hinge_loss'}
    assert set(load('benchmark_losses').CASES) == losses - left


def test_losses_and_their_page(load: Callable, tmp_path: Path) -> None:
    arguments = ['--losses', '--quick', '--only', 'pixelwise_kl_loss', '--rounds', '1', '--out', str(tmp_path)]
    assert load('benchmark').main(arguments) == 0
    page = tmp_path / 'page.md'
    page.write_text('# Head\n\n<!-- benchmark: begin -->\nold\n<!-- benchmark: end -->\n\ntail\n')
    for _ in range(2):  # again is the same
        load('benchmark').main(['--report', str(page), str(tmp_path / 'losses_cpu.json')])
        text = page.read_text()
        assert text.startswith('# Head\n')
        assert text.endswith('\ntail\n')
        assert 'old' not in text
        assert text.count('`pixelwise_kl_loss`') == 1
    (tmp_path / 'bare.md').write_text('nothing')
    with pytest.raises(ValueError, match='must have the lines <!-- benchmark: begin -->'):
        load('benchmark_report').write_page(tmp_path / 'bare.md', [])


def test_what_looking_for_nan_adds(load: Callable, tmp_path: Path) -> None:
    arguments = ['--check', '--quick', '--pairs', 'pspnet_structkd', 'retinanet_cwd', '--rounds', '2', '--warmup', '1']
    assert load('benchmark').main([*arguments, '--out', str(tmp_path)]) == 0
    results = json.loads((tmp_path / 'check_cpu.json').read_text())
    for entry in results['checks']:
        assert 0 < entry['check']['median'] < entry['step']['median']
        assert all(over > 1 for over in entry['ratio']['runs'])
    assert '| with over without |' in load('benchmark_report').text(results)
    assert (tmp_path / 'check_cpu.png').stat().st_size > 1000


def test_a_step_with_each_kind_of_teacher(load: Callable, tmp_path: Path) -> None:
    """A twin, a stream of data and a route: each is built as its config says, and steps."""
    wanted = ['frskd', 'mean-teacher', 'rco_upernet-r18-w32']
    arguments = ['--kinds', 'seg', '--only', *wanted, '--rounds', '2', '--warmup', '0', '--size', '64', '64']
    assert load('benchmark').main([*arguments, '--out', str(tmp_path)]) == 0
    results = json.loads((tmp_path / 'kinds_cpu.json').read_text())
    found = results['kinds'][0]['kinds']
    assert list(found) == ['student alone', *wanted]
    assert found['student alone']['ratio']['runs'] == [1, 1]
    assert found['frskd']['parameters'] > found['student alone']['parameters'] == found['mean-teacher']['parameters']
    text = load('benchmark_report').text(results)
    assert all(f'| {name} |' in text for name in found)
    assert (tmp_path / 'kinds_cpu.png').stat().st_size > 1000


def test_kinds_that_there_are(load: Callable) -> None:
    kinds = load('benchmark_kinds')
    shipped = {path.stem for path in (ROOT / 'configs' / 'teachers').glob('*.py')}
    assert {f'{name}{kinds.TASKS[task][0]}' for task in kinds.TASKS for name in kinds.known_kinds(task)} == shipped
    with pytest.raises(ConfigError, match="`--only` must name kinds of .*got \\['frskdd'\\]"):
        kinds.check_kinds('seg', ['frskdd'])


def test_what_options_change(load: Callable, tmp_path: Path) -> None:
    teacher = MODELS.build(toy_segmentor(8))
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    model = toy_distiller(teacher=dict(config=toy_segmentor(8), checkpoint=str(tmp_path / 'teacher.pth')))
    toy_config(model, tmp_path / 'run', max_iters=1).dump(str(tmp_path / 'config.py'))
    arguments = ['--gradients', str(tmp_path / 'config.py'), '--quick', '--out', str(tmp_path)]
    assert load('benchmark').main(arguments) == 0
    results = json.loads((tmp_path / 'gradients_cpu.json').read_text())
    options = results['gradients']['options']
    assert {*options} == {*load('benchmark_gradients').CHANGING} - {*load('benchmark_pairs').COMPILED}
    for name, change in options.items():
        assert {*change} == {*model.terms}
        for term, value in change.items():
            assert value <= (0.2 if '16' in name else 1e-3), (name, term)
            # a critic is the teacher's only witness in the holistic term, and at the first step it is the same
            assert (value == 0) == (term == 'holistic') or name == 'channels_last', (name, term)
    assert '| bf16 |' in load('benchmark_report').text(results)
    assert (tmp_path / 'gradients_cpu.png').stat().st_size > 1000
    toy_config(toy_segmentor(4), tmp_path / 'run', max_iters=1).dump(str(tmp_path / 'plain.py'))
    with pytest.raises(ConfigError, match='must be a distilling config, got a EncoderDecoder'):
        load('benchmark').main(['--gradients', str(tmp_path / 'plain.py'), '--out', str(tmp_path)])


def made_up(**medians: float) -> dict[str, Any]:
    """Three turns, in the second of which everything took ten times as long."""
    arms = {
        name.replace('_', ' ').replace('plus', '+'): dict(
            median=value,
            low=value,
            high=value,
            runs=[value, 10 * value, value],
            held_bytes=2**20,
            extra_bytes=2**20,
        )
        for name, value in medians.items()
    }
    entry = dict(pair='pspnet_cwd', title='T', precision='fp32', size=[8, 8], batch_size=2, arms=arms, skipped={})
    info = dict(device='D', cores=2, threads=2, torch='2', cuda=None)
    return dict(kind='pairs', quick=False, pairs=[entry], environment=info, command='c', targets=[])


def test_targets_follow_from_the_ratios(load: Callable) -> None:
    report = load('benchmark_report')
    results = made_up(
        student_alone=1.0, student_plus_teacher_forward=2.0, mmstructkd=2.05, bf16=1.5, cached=1.2, mmrazor=2.1
    )
    (entry,) = results['pairs']
    entry['terms'] = dict(median=0.205)
    entry['arms']['mmstructkd']['teacher'] = dict(median=0.5)
    results['targets'] = report.targets(results)
    met = {target['what']: target['met'] for target in results['targets']}
    assert met == {
        'CWD, fp32, over student + bare teacher forward': True,
        'CWD, fp32, over mmrazor': False,
        'CWD, bf16 teacher, over mmrazor': False,
        'CWD, cached teacher, over student alone': False,
    }
    text = report.text(results)
    assert '| CWD, fp32, over mmrazor | 0.97 | 0.976 | 0.976 to 0.976 | **not met** |' in text
    assert '| mmstructkd | 2.050 | 2.050 to 2.050 | 0.500 | 2.05 | 1.02 | 0.98 | 2.0 |' in text
    assert 'The terms take 0.205, 10.0 % of the step of mmstructkd.' in text
    assert report.targets(dict(results, quick=True)) == []


def test_arms_take_turns(load: Callable) -> None:
    order: list[str] = []

    def arm(name: str) -> Callable[[], float]:
        return lambda: float(len(order.append(name) or order))

    found = load('benchmark_measure').in_turn({name: arm(name) for name in 'abc'}, rounds=2, warmup=1)
    assert ''.join(order) == 'abcabcabc'
    assert found == {'a': [4.0, 7.0], 'b': [5.0, 8.0], 'c': [6.0, 9.0]}


def test_extra_memory_is_the_peak_and_not_the_sum(load: Callable) -> None:
    def step() -> None:
        for _ in range(3):
            torch.zeros(1_000_000)

    most = load('benchmark_measure').extra_memory(step, 'cpu')
    assert 4_000_000 <= most < 5_000_000


def test_spread(load: Callable) -> None:
    assert load('benchmark_measure').spread([3.0, 1.0, 2.0]) == dict(
        median=2.0, low=1.5, high=2.5, runs=[3.0, 1.0, 2.0]
    )
