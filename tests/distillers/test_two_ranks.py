"""Two processes against one: the gradient of a step, the critic's norm, memories, and faults that all of them name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.distillers.step_record import not_finite
from tests.distillers import two_ranks as ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found, by rank."""
    folder = tmp_path_factory.mktemp('ranks')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command += ['-m', 'tests.distillers.two_ranks', str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(2)]
    return [dict(result, folder=folder) for result in results]


def differs(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Norm of the difference by the norm."""
    assert first.keys() == second.keys()
    squares = [
        (float((value - second[name]).square().sum()), float(value.square().sum())) for name, value in first.items()
    ]
    return (sum(s for s, _ in squares) / sum(s for _, s in squares)) ** 0.5


@pytest.mark.parametrize('name', list(ranks.JOINT))
def test_the_gradient_is_that_of_the_joint_batch(name: str, found: list[dict[str, Any]]) -> None:
    one = ranks.gradients(ranks.JOINT[name], ranks.joint_batch(), ddp=False)
    both = [result['gradients'][name] for result in found]
    assert all(torch.equal(value, both[1][key]) for key, value in both[0].items())
    for part in ('student.', 'terms.'):
        first, second = ({k: v for k, v in grads.items() if k.startswith(part)} for grads in (one, both[0]))
        assert not first or differs(first, second) < 1e-4, part


@pytest.mark.parametrize('name', list(ranks.APART))
def test_what_compares_images_is_per_process(name: str, found: list[dict[str, Any]]) -> None:
    """As its docstring says: the mean over the processes of what each finds among its own images."""
    batch = ranks.joint_batch()
    halves = [ranks.gradients(ranks.APART[name], ranks.share(batch, rank), ddp=False) for rank in range(2)]
    mean = {key: (value + halves[1][key]) / 2 for key, value in halves[0].items()}
    both = found[0]['gradients'][name]
    assert differs(mean, both) < 1e-4
    plain = ranks.gradients(ranks.JOINT['plain'], batch, ddp=False)
    joint = ranks.gradients(ranks.APART[name], batch, ddp=False)
    assert (
        differs({key: value - plain[key] for key, value in joint.items()}, {k: v - plain[k] for k, v in both.items()})
        > 0.01
    )


def test_the_critics_norm_weighs_processes_by_their_maps(found: list[dict[str, Any]]) -> None:
    """Three maps in one process and one in the other are as four in one; also the second derivative."""
    one, (first, second) = ranks.norm_of(ranks.norm_maps()), [result['norm'] for result in found]
    for key in ('out', 'slope', 'maps'):
        assert torch.allclose(torch.cat([first[key], second[key]]), one[key], atol=1e-4, rtol=1e-4), key
    assert torch.allclose(first['weight'] + second['weight'], one['weight'], rtol=1e-4)
    for key in ('mean', 'var'):
        assert torch.allclose(first[key], one[key], rtol=1e-4), key
        assert torch.equal(first[key], second[key])


@pytest.mark.parametrize('kind', ['memory', 'regions'])
def test_memories_are_joint_and_anchors_are_not(kind: str, found: list[dict[str, Any]]) -> None:
    """A process compares its own student with the keys of all teachers."""
    as_it_is, other_student, other_teacher = found[0][kind]
    assert as_it_is == other_student
    assert as_it_is != other_teacher


CAUSES = {
    'teacher_nan': r"rank {at}: loss_kd_pixel is nan.* Side: teacher\. term 'pixel': '.*conv_seg' of the teacher",
    'student_nan': r'rank {at}: .*decode.loss_ce is nan.* Side: student\. .* of the student',
    'gradient_nan': r'the gradient of .* is not finite, the losses are .*Side: student',
    'value_inf': r"rank {at}: loss_kd_pixel is inf .*Side: loss. .* of term 'pixel'",
    'buffer_nan': r"rank {at}: term 'holistic': losses.0.critic.input_norm.running_mean \(nan\) in the running stat",
    'weights_huge': r'rank {at}: .*Side: student\. Its weights are not sound',
}


@pytest.mark.parametrize('kind', ['OptimWrapper', 'mmstructkd.AutocastOptimWrapper'])
@pytest.mark.parametrize('at', [0, 1])
@pytest.mark.parametrize('fault', list(ranks.FAULTS))
def test_all_processes_stop_together_and_say_the_same(
    fault: str, at: int, kind: str, found: list[dict[str, Any]]
) -> None:
    (first, kept), (second, kept_too) = (result['messages'][f'{fault} {at} {kind}'] for result in found)
    assert first == second
    assert kept
    assert kept_too
    assert re.search(CAUSES[fault].format(at=at), first), first
    assert f'rank {1 - at}' not in first


def test_no_checkpoint_of_any_process_is_spoilt(found: list[dict[str, Any]]) -> None:
    assert found[0]['run'] == found[1]['run']
    assert found[0]['run'].startswith('iteration 3: the gradient of ')
    folder = found[0]['folder'] / 'run'
    assert [path.name for path in folder.glob('*.pth')] == ['iter_2.pth']
    content = read_checkpoint(str(folder / 'iter_2.pth'))
    assert not any(not_finite(content[part]) for part in ('state_dict', 'optimizer', 'mmstructkd'))
