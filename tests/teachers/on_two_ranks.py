"""What two processes do in test_on_two_ranks.py: a step of each kind of teacher under DDP; started by torchrun."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from torch import distributed

from mmstructkd import compat
from mmstructkd.optim import for_distiller
from mmstructkd.testing import toy_batch
from tests.teachers.kinds import KINDS, build

STEPS = 2


def train(kind: str, rank: int, *, silent: bool) -> dict[str, torch.Tensor]:
    """Two steps, each process on images of its own, no look for unused parameters.

    Args:
        kind: of the teacher.
        rank: of the process.
        silent: with all terms switched off after they were built.

    Returns:
        All trained parameters afterwards, by name.
    """
    model = build(kind)
    settings = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01), clip_grad=dict(max_norm=1.0))
    settings.update(constructor='mmstructkd.DistillOptimWrapperConstructor')
    wrapped = MMDistributedDataParallel(model)
    wrapper = for_distiller(build_optim_wrapper(model, settings), model)
    for term in model.terms.values():
        term.factor = 0.0 if silent else 1.0
    for step in range(STEPS):
        model.set_progress(step, STEPS)
        torch.manual_seed(10 * step + rank)
        batch: dict[str, Any] = toy_batch()
        total, _ = model.parse_losses(wrapped(**copy.deepcopy(batch), mode='loss'))
        wrapper.update_params(total)
        model.teacher.after_step(model.student)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def main(folder: Path) -> None:
    """Write what this process found."""
    compat.install()
    distributed.init_process_group('gloo')
    rank = distributed.get_rank()
    found = {f'{kind} {silent}': train(kind, rank, silent=silent) for kind in sorted(KINDS) for silent in (False, True)}
    torch.save(found, folder / f'{rank}.pt')
    distributed.destroy_process_group()


if __name__ == '__main__':
    main(Path(sys.argv[1]))
