"""Values and gradients that published code gave, and how a loss is compared with them.

The cases lie beside this file (``README.md`` there says where they come from). ``$MMSTRUCTKD_GOLDEN`` names another
folder with cases of the same names, other shapes included.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

OWN = Path(__file__).resolve().parent
FOLDER = Path(os.environ.get('MMSTRUCTKD_GOLDEN') or OWN)

#: Patterns that tests have asked for; what no test asks for is no test.
asked: set[str] = set()


def names(pattern: str) -> list[str]:
    """Cases of the folder whose names fit, sorted. None is an error: a test of nothing would pass."""
    asked.add(pattern)
    found = sorted(path.stem for path in FOLDER.glob('*.pt') if fnmatch.fnmatchcase(path.stem, pattern))
    if not found:
        raise FileNotFoundError(f'no case {pattern!r} in {FOLDER}')
    return found


def case_names(pattern: str) -> pytest.MarkDecorator:
    """Run a test on each case whose name fits, as its argument ``name``."""
    return pytest.mark.parametrize('name', names(pattern))


def load(name: str) -> dict[str, Any]:
    """Read a case."""
    return torch.load(FOLDER / f'{name}.pt', weights_only=True)


def learner(case: dict[str, Any]) -> Any:
    """What learns, as leaves of a graph: a tensor, or a list of them."""
    given = case['student']
    if isinstance(given, Tensor):
        return given.clone().requires_grad_()
    return [part.clone().requires_grad_() for part in given]


def close(got: Tensor, want: Tensor) -> None:
    """Relative 1e-4, as a whole and entry by entry."""
    want = want.to(got.dtype)
    assert got.shape == want.shape
    assert (got - want).norm() <= 1e-4 * want.norm()
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def check(
    case: dict[str, Any],
    student: Tensor | Sequence[Tensor],
    loss: Tensor,
    *,
    value: bool = True,
    factor: float = 1.0,
) -> None:
    """Compare value and gradients with those of the case.

    Args:
        case: the case.
        student: from :func:`learner`.
        loss: computed from it.
        value: compare the value too.
        factor: what the loss is to be multiplied by for the case's gradient.
    """
    parts = [student] if isinstance(student, Tensor) else list(student)
    wanted = [case['grad']] if isinstance(case['grad'], Tensor) else case['grad']
    if value:
        close(loss.detach().reshape(()), case['loss'].reshape(()))
    # What learns nothing in the published code has a gradient of zeros there.
    grads = torch.autograd.grad(factor * loss, parts, allow_unused=True, materialize_grads=True)
    for got, want in zip(grads, wanted, strict=True):
        close(got, want)
