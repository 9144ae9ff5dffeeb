"""Two processes with each kind of teacher: one set of weights, with terms on and off, no unused parameter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.teachers.kinds import KINDS, build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The trained parameters of both processes, by kind and whether the terms were silent."""
    folder = tmp_path_factory.mktemp('ranks')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command += ['-m', 'tests.teachers.on_two_ranks', str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(2)]


@pytest.mark.parametrize('silent', [False, True])
@pytest.mark.parametrize('kind', sorted(KINDS))
def test_both_processes_have_one_set_of_weights(kind: str, silent: bool, found: list[dict[str, Any]]) -> None:
    """And it moved: what is trained beside the student as well."""
    one, other = (result[f'{kind} {silent}'] for result in found)
    assert list(one) == list(other)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    start = dict(build(kind).named_parameters())
    for part in {name.split('.')[0] for name in one} - {'terms'}:
        assert any(not torch.equal(value, start[name]) for name, value in one.items() if name.startswith(part)), part
