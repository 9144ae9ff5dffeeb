"""What each option of the teacher changes in the student's gradient, with a config's own networks and images."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Mapping
from typing import Any

import torch
from benchmark_pairs import OPTIONS, OURS
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from torch import Tensor

from mmstructkd.checkpoints import IN_CONFIG, consented, trusts
from mmstructkd.distillers import StructuredDistiller
from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.tasks.batches import real_batch

__all__ = ['measure']

#: Of the options that are timed those that change what the teacher shows; the pace does not.
CHANGING = {name: options for name, options in OPTIONS.items() if name not in (OURS, 'every=4', 'cached')}
CHANGING |= {'fp16': dict(dtype='fp16'), 'cached in fp16': dict(cache=dict(folder=''))}


def _build(cfg: Config, options: Mapping[str, Any], device: str) -> StructuredDistiller:
    """The config's distiller, in training mode, from the same draws each time."""
    model = copy.deepcopy(cfg.model)
    if 'teacher' in model:
        model.teacher.update(options)
    set_random_seed((cfg.get('randomness') or {}).get('seed') or 0)
    with consented(trusts(cfg), IN_CONFIG):
        distiller = MODELS.build(model)
        distiller.init_weights()
    if not isinstance(distiller, StructuredDistiller):
        raise ConfigError(f'benchmark: `--gradients` must be a distilling config, got a {type(distiller).__name__}.')
    return distiller.to(device).train()


def _gradients(distiller: StructuredDistiller, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """By term the gradient of its loss in the student, as one vector."""
    torch.manual_seed(1)  # the same dropout in each
    _, seen = distiller.observe(batch['inputs'], batch['data_samples'], list(distiller.terms.values()))
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    found = {}
    for name, scored in distiller.score(seen).items():
        grads = torch.autograd.grad(scored[f'loss_kd_{name}'], parameters, retain_graph=True, allow_unused=True)
        found[name] = torch.cat([g.flatten() for g in grads if g is not None])
    return found


def measure(
    path: str, changes: Mapping[str, Any] | None, device: str, leave_out: Collection[str] = ()
) -> dict[str, Any]:
    """Compare each option with the plain teacher on the config's first batch.

    Args:
        path: a distilling config, whose teacher and data are there.
        changes: overrides of the config.
        device: ``'cpu'`` or ``'cuda'``.
        leave_out: options that are not compared.

    Returns:
        By option and term the norm of the difference of the gradients over the
        norm of the plain teacher's, and the number of images.
    """
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(ConfigDict(changes or {}))
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    plain = _build(cfg, {}, device)
    batch = real_batch(cfg, plain)
    expected = _gradients(plain, batch)
    out: dict[str, Any] = dict(
        config=path, images=len(batch['inputs']), size=list(batch['inputs'].shape[2:]), options={}
    )
    for name, options in CHANGING.items():
        if name in leave_out:
            continue
        with tempfile.TemporaryDirectory(prefix='benchmark_') as folder:
            options = dict(cache=dict(folder=folder)) if 'cache' in options else options
            found = _gradients(_build(cfg, options, device), batch)
        out['options'][name] = {term: float((found[term] - one).norm() / one.norm()) for term, one in expected.items()}
        print(f'{name}: {out["options"][name]}', flush=True)
    return out
