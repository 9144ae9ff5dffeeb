from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.memories import ClassQueue

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch
from torch import distributed
from mmstructkd.losses import MemoryContrastLoss
from mmstructkd.memories import ClassQueue
from mmstructkd.structures import Targets

folder, rank = sys.argv[1], int(sys.argv[2])
distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
queue = ClassQueue(2, 5, 1)
for step in range(3):
    vectors = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]) + 10 * rank + 100 * step
    queue.push(vectors, torch.tensor([[True, rank == 0], [step > 0, True]]))
loss = MemoryContrastLoss(num_classes=3, pixel_capacity=50, region_capacity=10, pixels_per_image=4, seed=0)
torch.manual_seed(rank)
loss.bind(torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 4, 4))
for _ in range(2):
    loss(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4), Targets(labels=torch.randint(0, 4, (2, 4, 4))))
queues = {k: v for k, v in loss.state_dict().items() if 'projection' not in k}
torch.save({'queue': queue.state_dict(), 'loss': queues}, f'{folder}/{rank}.pt')
distributed.destroy_process_group()
"""


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def plain_push(lists, vectors, valid, capacity):
    """The same queue as lists: what a class holds, oldest first."""
    for held, some, there in zip(lists, vectors, valid, strict=True):
        held += [vector for vector, good in zip(some.flatten().tolist(), there.tolist(), strict=True) if good]
        del held[: max(0, len(held) - capacity)]


@pytest.mark.parametrize('number', [1, 3, 9])
def test_holds_the_last_of_each_class(number):
    capacity = 4
    queue, lists = ClassQueue(3, capacity, 1), [[], [], []]
    for step in range(12):
        vectors = torch.arange(3.0 * number).view(3, number, 1) + 100 * step
        valid = torch.rand(3, number) > 0.4
        valid[2] = step == 5
        queue.push(vectors, valid)
        plain_push(lists, vectors, valid, capacity)
        for k in range(3):
            assert sorted(queue.keys[k, : queue.filled[k]].flatten().tolist()) == sorted(lists[k])
            # In order, from the oldest on.
            turned = queue.keys[k].roll(-int(queue.pointer[k]), 0).flatten().tolist()
            full = len(lists[k]) == capacity
            assert (turned if full else queue.keys[k, : len(lists[k])].flatten().tolist()) == lists[k]
    assert queue.filled.tolist() == [len(held) for held in lists]
    assert not queue.slots[-1].any()


def test_vectors_go_to_their_own_class():
    queue = ClassQueue(2, 2, 2)
    queue.push(torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]]), torch.tensor([[True], [True]]))
    assert queue.keys[0, 0].tolist() == [1, 1]
    assert queue.keys[1, 0].tolist() == [2, 2]


def test_wraps_without_losing_anything():
    queue = ClassQueue(1, 5, 1)
    everything = torch.ones(1, 3, dtype=torch.bool)
    queue.push(column(1, 2, 3)[None], everything)
    queue.push(column(4, 5, 6)[None], everything)
    assert queue.keys.flatten().tolist() == [6, 2, 3, 4, 5]
    assert (queue.pointer.item(), queue.filled.item()) == (1, 5)


def test_only_what_is_filled_is_drawn():
    queue = ClassQueue(2, 10, 1)
    keys, there = queue.sample(4, 0)
    assert keys.shape == (2, 4, 1)
    assert not there.any()
    queue.push(torch.stack([column(1, 2, 3), column(7, 8, 9)]), torch.tensor([[True] * 3, [True, False, False]]))
    keys, there = queue.sample(4, 0)
    assert there.sum(1).tolist() == [3, 1]
    assert sorted(keys[0][there[0]].flatten().tolist()) == [1, 2, 3]
    assert keys[1][there[1]].item() == 7


def test_draws_depend_on_the_step_and_come_as_copies():
    queue = ClassQueue(1, 50, 1)
    queue.push(torch.arange(50.0).view(1, 50, 1), torch.ones(1, 50, dtype=torch.bool))
    first, again, other = queue.sample(8, 3)[0], queue.sample(8, torch.tensor(3))[0], queue.sample(8, 4)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) == 8
    queue.push(torch.zeros(1, 50, 1), torch.ones(1, 50, dtype=torch.bool))
    assert torch.equal(first, again)


def test_what_is_not_there_may_be_anything_and_no_graph_is_kept():
    queue = ClassQueue(1, 3, 1)
    vectors = torch.tensor([[[float('nan')], [2.0]]], requires_grad=True)
    queue.push(vectors, torch.tensor([[False, True]]))
    assert queue.slots.isfinite().all()
    assert not queue.slots.requires_grad
    assert queue.keys[0, 0] == 2


def test_resumes_from_its_state():
    first, second = ClassQueue(2, 4, 3), ClassQueue(2, 4, 3)
    first.push(torch.randn(2, 3, 3), torch.ones(2, 3, dtype=torch.bool))
    second.load_state_dict(first.state_dict(), strict=True)
    more, there = torch.randn(2, 2, 3), torch.tensor([[True, True], [False, True]])
    for queue in (first, second):
        queue.push(more, there)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert set(first.state_dict()) == {'slots', 'filled', 'pointer'}


def test_two_processes_hold_the_same(tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', SCRIPT, str(tmp_path)]
    runs = [
        subprocess.Popen([*command, str(rank)], env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for rank in range(2)
    ]
    try:
        for run in runs:
            errors = run.communicate(timeout=300)[1]
            assert run.returncode == 0, errors[-3000:]
    finally:
        for run in runs:
            run.kill()
    first, second = (torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2))
    for part in ('queue', 'loss'):
        assert first[part].keys() == second[part].keys()
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), name
    # One process that sees all of it, rank after rank.
    alone = ClassQueue(2, 5, 1)
    for step in range(3):
        parts = [torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]) + 10 * rank + 100 * step for rank in range(2)]
        masks = [torch.tensor([[True, rank == 0], [step > 0, True]]) for rank in range(2)]
        alone.push(torch.cat(parts, 1), torch.cat(masks, 1))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, first['queue'][name]), name
    assert (first['loss']['pixels.filled'] > 8).all()


def test_bad_arguments():
    with pytest.raises(ConfigError, match='ClassQueue: `capacity` must be an integer of at least 1, got 0'):
        ClassQueue(2, 0, 3)
    queue = ClassQueue(2, 4, 3)
    with pytest.raises(ShapeError, match=r'must have shapes \(2, n, 3\) and \(2, n\), got \(2, 5, 4\) and \(2, 5\)'):
        queue.push(torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r'got \(2, 5, 3\) and \(2, 4\)'):
        queue.push(torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.bool))
