r"""Choose the stops of a route (RouteTeacher): how far a student is from each checkpoint of a teacher.

Example::

    python tools/pick_route.py configs/teachers/rco_upernet-r18-w32_upernet-r18-w8_300_scenes-128x128.py \
        work_dirs/student/iter_300.pth work_dirs/route/iter_*.pth --stops 3

Hardness is the divergence KL(teacher || student) at temperature 1, mean over pixels that
count, at the taps of the config's terms that compare scores of classes. The stops rise by
about equal steps of it, and each teaches for an equal part of the training. The
checkpoints are taken in the order in which they are given: that of their training.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, set_random_seed

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.errors import ConfigError
from mmstructkd.functional import equal_hardness_route
from mmstructkd.registry import MODELS
from mmstructkd.running import Overrides, one_line_errors, read_config
from mmstructkd.terms import parse_terms

KL = {'type': 'mmstructkd.PixelwiseKLLoss', 'loss_weight': 1.0}
#: Keys of a RouteTeacher that a teacher of one checkpoint does not take.
ROUTE = ('type', 'route', 'checkpoint', 'cache', 'every')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Choose the stops of a route of checkpoints by how hard each is.')
    parser.add_argument('config', help='a distilling config with one teacher')
    parser.add_argument('student', help="checkpoint of the student, e.g. of a training without a teacher's help")
    parser.add_argument('checkpoints', nargs='+', help="the teacher's, in the order of its training")
    parser.add_argument('--stops', type=int, default=3, help='how many to choose, at most (default: 3)')
    parser.add_argument('--batches', type=int, default=10, help='batches of the training data (default: 10)')
    parser.add_argument('--seed', type=int, default=0, help='of their order and augmentation')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--trust-checkpoint', action='store_true', help='read files that need more than weights')
    parser.add_argument('--cfg-options', nargs='+', action=Overrides, help='overrides, key=value')
    args = parser.parse_args(argv)
    if args.batches < 1:
        parser.error('--batches must be above 0')
    if not 1 <= args.stops <= len(args.checkpoints):
        parser.error(f'--stops must lie between 1 and the number of checkpoints, {len(args.checkpoints)}')
    return args


def terms_on_scores(terms: Any) -> dict[str, Any]:
    """The terms that compare scores of classes, with the divergence in the place of their loss.

    Args:
        terms: of the config.

    Returns:
        Terms by name.

    Raises:
        ConfigError: there is none.
    """
    found = {
        name: {**{key: terms[name][key] for key in ('tap', 'match') if key in terms[name]}, 'loss': dict(KL)}
        for name, term in parse_terms(terms).items()
        if term.loss.over_classes and not term.connector_config
    }
    if not found:
        raise ConfigError(
            f'pick_route.py: `terms` must have one on scores of classes, got {list(terms)}. Tap the last layer of the '
            "head with a PixelwiseKLLoss, e.g. tap='decode_head.conv_seg'."
        )
    return found


def batches_of(cfg: Config, number: int, seed: int) -> list[Any]:
    """The first batches of the training data, the same for every checkpoint."""
    loader = copy.deepcopy(cfg.train_dataloader)
    loader.update(num_workers=0, persistent_workers=False)
    set_random_seed(seed)
    found: list[Any] = []
    for batch in Runner.build_dataloader(loader, seed=seed):
        found.append(batch)
        if len(found) == number:
            break
    return found


@torch.no_grad()
def hardness_of(model: torch.nn.Module, batches: Sequence[Any]) -> dict[str, float]:
    """Mean divergence by term.

    Args:
        model: the distiller, in eval.
        batches: of a data loader, not preprocessed.

    Returns:
        Nats by term.
    """
    totals = dict.fromkeys(model.terms, 0.0)
    for batch in batches:
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        _, seen = model.observe(data['inputs'], data['data_samples'], list(model.terms.values()))
        for name, scored in model.score(seen).items():
            totals[name] += scored[f'loss_kd_{name}'].item()
    return {name: total / len(batches) for name, total in totals.items()}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print a table and the route; return the route."""
    args = parse_args(argv)
    cfg = read_config(args.config, args.cfg_options, 'pick_route.py')
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    if 'teacher' not in cfg.model or 'config' not in cfg.model.teacher:
        raise ConfigError(
            'pick_route.py: `config` must have one teacher with a config, got '
            f'{[key for key in ("teacher", "teachers") if key in cfg.model]}. A route belongs to one network.'
        )
    terms = terms_on_scores(cfg.model.terms)
    student = read_checkpoint(args.student, trust=args.trust_checkpoint)
    batches = batches_of(cfg, args.batches, args.seed)
    rows = []
    for checkpoint in args.checkpoints:
        config = copy.deepcopy(cfg.model)
        kept = {key: value for key, value in config.teacher.items() if key not in ROUTE}
        config.teacher = dict(kept, checkpoint=checkpoint, trust_checkpoint=args.trust_checkpoint)
        config.terms = terms
        config.pop('streams', None)
        model = MODELS.build(config)
        model.load_state_dict(student.get('state_dict', student), strict=True)
        rows.append(hardness_of(model.to(args.device).eval(), batches))
    hardness = [sum(row.values()) for row in rows]
    stops = equal_hardness_route(hardness, args.stops)
    print(f'| checkpoint | {" | ".join(terms)} | hardness | stop |')
    print('| --- ' * (len(terms) + 3) + '|')
    for place, (checkpoint, row) in enumerate(zip(args.checkpoints, rows, strict=True)):
        cells = [f'{value:.4f}' for value in (*row.values(), hardness[place])]
        print(f'| {checkpoint} | {" | ".join(cells)} | {"*" if place in stops else ""} |')
    iterations = cfg.train_cfg.get('max_iters')
    if iterations is None:
        raise ConfigError(
            'pick_route.py: `train_cfg` must count iterations (`max_iters`), got '
            f'{dict(cfg.train_cfg)}. The begins of a route are iterations.'
        )
    route: list[dict[str, Any]] = []
    for number, place in enumerate(stops):
        begin = {'begin': number * iterations // len(stops)} if number else {}
        route.append({'checkpoint': args.checkpoints[place], **begin})
    steps = (f'dict({", ".join(f"{key}={value!r}" for key, value in step.items())})' for step in route)
    print('\nroute=[\n    ' + ',\n    '.join(steps) + ']')
    return route


if __name__ == '__main__':
    with one_line_errors():
        main()
