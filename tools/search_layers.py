r"""Search which of the teacher's layers a layer of the student should learn from.

Example::

    python tools/search_layers.py configs/features/dfa_pspnet-r101-d8_pspnet-r18-d8_4xb2-80k_cityscapes-512x1024.py \
        --groups backbone.layer3 backbone.layer4 --iters 4000 --split 0.5

Stage 1 of Differentiable Feature Aggregation Search (arXiv:2008.00506), group by
group. A group is a layer of the student; its candidates are the blocks of the
teacher's module of that name, or taps of the teacher: ``GROUP=TAP,TAP``. Each
iteration has two steps:

- the student's weights, on one part of the training set: its task, and the bridge loss;
- the scores of the candidates, on the other part: the bridge loss alone.

The bridge loss (:func:`mmstructkd.functional.layer_bridge.bridge_loss`) asks the
student to imitate the mix, and the mix to serve the rest of the student, which is run
on it. Without the second half the scores fall on the layer that is easiest to imitate.

``CONFIG`` is a distilling config, of which the student, the teacher, the training data
and the optimiser (with constant settings for all weights; its ``clip_grad`` holds) are
read. What is printed goes into a normal config: ``weights=[...]`` of a
``LayerMixConnector`` whose teacher's taps are those that are named beside it. No code of
the authors was found; squared distance, means and Adam for the scores are our reading.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS, OPTIMIZERS, init_default_scope
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn
from torch.utils.data import Subset

from mmstructkd import compat
from mmstructkd.connectors import build_connector
from mmstructkd.distillers import StructuredDistiller
from mmstructkd.errors import ConfigError, check_finite_number, check_positive, suggest
from mmstructkd.functional.core.resize import resize_map
from mmstructkd.functional.layer_bridge import bridge_loss, mix_layers
from mmstructkd.optimizers import check_optimizer
from mmstructkd.registry import MODELS
from mmstructkd.running import one_line_errors, read_config
from mmstructkd.taps import Inject
from mmstructkd.teachers.loading import load_weights
from mmstructkd.terms import Term

OWNER = 'search_layers'
#: What a search takes of a distiller: no terms, stages, streams or gates of its own.
READ = ('type', 'student', 'teacher', 'data_preprocessor', 'probe_size')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Search which of the teacher's layers the student should learn from.")
    parser.add_argument('config', help='path of a distilling config')
    parser.add_argument(
        '--groups', nargs='+', required=True, help="layers of the student, each GROUP or GROUP=TAP,TAP of the teacher's"
    )
    parser.add_argument('--iters', type=int, default=4000, help='iterations for each group (default: %(default)s)')
    parser.add_argument(
        '--split', type=float, default=0.5, help='share of the training set for the weights (default: %(default)s)'
    )
    parser.add_argument('--score-lr', type=float, default=3e-3, help="rate of the scores' Adam (default: %(default)s)")
    parser.add_argument('--imitation-weight', type=float, default=1.0, help='of the distance to the mix')
    parser.add_argument('--injection-weight', type=float, default=1.0, help='of the loss of the rest of the student')
    parser.add_argument('--seed', type=int, default=0, help='of the split, the data and the weights')
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='where to run (default: cuda where there is one)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides, key=value')
    args = parser.parse_args(argv)
    if args.iters < 1:
        parser.error('--iters must be 1 or more')
    if not 0 < args.split < 1:
        parser.error('--split must lie between 0 and 1')
    return args


# --- what is searched ----------------------------------------------------------------------------------------------


def candidates(group: str, teacher: nn.Module) -> tuple[str, list[str]]:
    """Read a group of the command line.

    Args:
        group: ``'backbone.layer3'``, or ``'backbone.layer3=backbone.layer3.1,backbone.layer3.5'``.
        teacher: the teacher's network.

    Returns:
        The student's tap, and those of the teacher.

    Raises:
        ConfigError: the teacher has no module of that name with blocks, or there are fewer than two candidates.
    """
    student, equals, listed = group.partition('=')
    if equals:
        found = [name for name in listed.split(',') if name]
    else:
        modules = dict(teacher.named_modules())
        if student not in modules:
            raise ConfigError(
                f'{OWNER}: `--groups` must name a module that the teacher has as well, got {student!r}. '
                f'{suggest(student, modules)} Or write {student}=TAP,TAP with taps of the teacher.'
            )
        blocks = modules[student]
        several = isinstance(blocks, (nn.Sequential, nn.ModuleList))
        found = [f'{student}.{name}' for name, _ in blocks.named_children()] if several else []
    if len(found) < 2:
        raise ConfigError(
            f'{OWNER}: `--groups` must have at least two candidates in each group, got {found} for {group!r}. '
            f'Write {student}=TAP,TAP with taps of the teacher.'
        )
    return student, found


def build_model(cfg: Config, groups: Sequence[str]) -> StructuredDistiller:
    """Build student and teacher, with a term for each group that listens where the search does.

    Args:
        cfg: a distilling config with one teacher.
        groups: of the command line.

    Returns:
        A distiller with the terms ``group0``, ``group1``, ...

    Raises:
        ConfigError: the config does not distil, or a group cannot be mixed: the widths or sizes of its candidates
            differ.
    """
    model = cfg.get('model')
    if not isinstance(model, Mapping) or model.get('student') is None or not isinstance(model.get('teacher'), Mapping):
        raise ConfigError(
            f'{OWNER}: `config` must be a distilling config with one `teacher`, got model keys '
            f'{sorted(model) if isinstance(model, Mapping) else model!r}.'
        )
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    settings = {key: copy.deepcopy(model[key]) for key in READ if key in model}
    settings['teacher'].pop('cache', None)  # each image is seen in many views
    if cfg.get('data_preprocessor') is not None:
        settings.setdefault('data_preprocessor', copy.deepcopy(cfg.data_preprocessor))
    teacher = MODELS.build(dict({'type': 'mmstructkd.FrozenTeacher'}, **settings['teacher']))
    if teacher.network is None:
        raise ConfigError(f'{OWNER}: `teacher` must be a network of its own, got {type(teacher).__name__}.')
    read = [candidates(group, teacher.network) for group in groups]
    settings['teacher'] = teacher
    settings['terms'] = {
        f'group{number}': dict(
            tap=dict(student=student, teacher=layers),
            match='order',
            connector=dict(type='mmstructkd.LayerMixConnector'),
            loss=dict(type='mmstructkd.FeatureMSELoss'),
        )
        for number, (student, layers) in enumerate(read)
    }
    return MODELS.build(settings)


class Search:
    """The search of one group.

    Args:
        model: see :func:`build_model`.
        name: of the group's term, whose scores and projection of the student are learned.
        optimizer: config of the optimiser of the weights.
        score_lr: rate of the scores.
        imitation_weight: of the distance to the mix, at least 0.
        injection_weight: of the task loss of the student's rest on the mix, at least 0.
        clip_grad: as in an ``optim_wrapper``, for the weights; ``None``: not clipped.

    Attributes:
        scores: one a candidate, learned.
        bring: from the teacher's width to the student's, learned.
    """

    def __init__(
        self,
        model: StructuredDistiller,
        name: str,
        optimizer: Mapping[str, Any],
        *,
        score_lr: float = 3e-3,
        imitation_weight: float = 1.0,
        injection_weight: float = 1.0,
        clip_grad: Mapping[str, Any] | None = None,
    ) -> None:
        check_positive(OWNER, '--score-lr', score_lr)
        for argument, value in (('--imitation-weight', imitation_weight), ('--injection-weight', injection_weight)):
            check_finite_number(OWNER, argument, value, minimum=0)
        check_optimizer(OWNER, optimizer)
        self.model, self.name = model, name
        self.weights = {'imitation_weight': imitation_weight, 'injection_weight': injection_weight}
        self.clip_grad = clip_grad
        term: Term = model.terms[name]
        connector = term.connectors[0]
        self.project: nn.Module = connector.projections[0]
        self.scores: nn.Parameter = connector.scores
        own, theirs = term.levels[0].student[1], term.levels[0].teacher[1]
        self.bring: nn.Module = nn.Identity()
        if own != theirs:
            mixed = build_connector(OWNER, dict(type='mmstructkd.ConvConnector'), [theirs], [own], '--groups')
            self.bring = mixed.to(self.scores.device)
        self.learned = [
            parameter
            for part in (model.student, self.project, self.bring)
            for parameter in part.parameters()
            if parameter.requires_grad
        ]
        self.of_weights = OPTIMIZERS.build({**copy.deepcopy(dict(optimizer)), 'params': self.learned})
        self.of_scores = torch.optim.Adam([self.scores], lr=score_lr)

    def losses(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute both losses of a batch.

        Args:
            batch: ``inputs`` and ``data_samples``, preprocessed.

        Returns:
            The student's own losses, summed, and the bridge loss; both with their graph.
        """
        term: Term = self.model.terms[self.name]
        samples = batch['data_samples']
        losses, seen = self.model.observe(batch['inputs'], copy.deepcopy(samples), [term])
        (student,), layers = term.tensors(seen.student, seen.teacher)
        size = (int(student.shape[-2]), int(student.shape[-1]))
        layers = [resize_map(layer.detach(), size) for layer in layers]
        scores = self.scores[0]
        with Inject(self.model.student, term.student_taps[0], self.bring(mix_layers(layers, scores))):
            tail = self.model.student(batch['inputs'], copy.deepcopy(samples), mode='loss')
        bridge = bridge_loss(self.project(student), layers, scores=scores, task_loss=self._summed(tail), **self.weights)
        return self._summed(losses), bridge

    def _summed(self, losses: dict[str, Any]) -> Tensor:
        total, _ = self.model.student.parse_losses(losses)
        return total

    def step(self, batch: Mapping[str, Any], held_out: Mapping[str, Any]) -> tuple[float, float]:
        """Update the weights on one batch and the scores on another.

        Args:
            batch: of the part for the weights.
            held_out: of the part for the scores.

        Returns:
            Both objectives, as they were before their updates.
        """
        task, bridge = self.losses(batch)
        objective = task + bridge
        self._update(self.of_weights, objective, self.learned, clip=True)
        _, searched = self.losses(held_out)
        self._update(self.of_scores, searched, [self.scores], clip=False)
        return float(objective.detach()), float(searched.detach())

    def _update(self, optimizer: Any, loss: Tensor, parameters: list[Any], *, clip: bool) -> None:
        if not bool(loss.detach().isfinite()):
            raise FloatingPointError(f'{OWNER}: the loss of {self.name!r} is {float(loss)}. Lower the learning rate.')
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        if clip and self.clip_grad:
            settings = dict(self.clip_grad)
            by_value = settings.pop('type', 'norm') == 'value'
            (nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_)(parameters, **settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def mix(self) -> list[float]:
        """The weights of the candidates as they stand; their sum is 1."""
        return torch.softmax(self.scores.detach()[0].float(), dim=0).tolist()


# --- data ------------------------------------------------------------------------------------------------------


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide a training set at random.

    Args:
        count: number of samples.
        share: of the first part.
        seed: of the draw.

    Returns:
        Indices of both parts.

    Raises:
        ConfigError: one of them would be empty.

    Example:
        >>> [len(part) for part in split(5, 0.5, seed=0)]
        [2, 3]
    """
    first = int(count * share)
    if not 0 < first < count:
        raise ConfigError(
            f'{OWNER}: `--split` must leave samples for weights and scores, got {share:g} of {count}. Change it.'
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[:first]), sorted(order[first:])


def batches(cfg: Config, dataset: Any, indices: Sequence[int], model: StructuredDistiller, seed: int) -> Iterator[Any]:
    """Yield preprocessed batches of a part of the training set, again and again."""
    settings = copy.deepcopy(cfg.train_dataloader)
    settings.dataset = Subset(dataset, indices)
    size = settings.get('batch_size')
    if size is not None:
        settings.batch_size = min(size, len(indices))
    loader = Runner.build_dataloader(settings, seed=seed)
    while True:
        for batch in loader:
            yield model.data_preprocessor(batch, True)


def search(args: argparse.Namespace) -> dict[str, list[float]]:
    """Search all groups, one after the other, and print what was found.

    Args:
        args: the command line.

    Returns:
        By group the weights of its candidates.

    Raises:
        ConfigError: the config or a group cannot be used.
        FloatingPointError: a loss is not finite.
    """
    compat.install()
    cfg = read_config(args.config, args.cfg_options, OWNER)
    for key in ('train_dataloader', 'optim_wrapper'):
        if not isinstance(cfg.get(key), Mapping):
            raise ConfigError(f'{OWNER}: the config must define `{key}`, got {cfg.get(key)!r}.')
    if not isinstance(cfg.train_dataloader.get('dataset'), Mapping):
        raise ConfigError(f'{OWNER}: `train_dataloader` must have a `dataset`, got {cfg.train_dataloader!r}.')
    set_random_seed(args.seed)
    model = build_model(cfg, args.groups)
    model.init_weights()
    if cfg.get('load_from') is not None:
        load_weights(model.student, cfg.load_from, owner=OWNER, allow_random=True)
    model.to(args.device or ('cuda' if torch.cuda.is_available() else 'cpu')).train()
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    parts = split(len(dataset), args.split, args.seed)
    train, held_out = (batches(cfg, dataset, part, model, args.seed) for part in parts)
    found = {}
    for name, group in zip(model.terms, args.groups, strict=True):
        one = Search(
            model,
            name,
            cfg.optim_wrapper.optimizer,
            score_lr=args.score_lr,
            imitation_weight=args.imitation_weight,
            injection_weight=args.injection_weight,
            clip_grad=cfg.optim_wrapper.get('clip_grad'),
        )
        for number in range(args.iters):
            objective, bridge = one.step(next(train), next(held_out))
            if (number + 1) % max(args.iters // 10, 1) == 0:
                shares = ', '.join(f'{share:.3f}' for share in one.mix())
                print(f'{group} {number + 1}/{args.iters}: weights {objective:.4g}, scores {bridge:.4g}, [{shares}]')
        found[group] = one.mix()
    print()
    for (name, term), weights in zip(model.terms.items(), found.values(), strict=True):
        taps = ', '.join(repr(str(tap)) for tap in term.teacher_taps)
        print(f'# {args.groups[int(name.removeprefix("group"))]}')
        print(f'tap=dict(student={str(term.student_taps[0])!r}, teacher=[{taps}]),')
        shares = ', '.join(f'{weight:.4f}' for weight in weights)
        print(f"connector=dict(type='mmstructkd.LayerMixConnector', weights=[{shares}]),", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Search.

    Args:
        argv: arguments; ``None``: the command line's.

    Returns:
        Exit code.
    """
    args = parse_args(argv)
    with one_line_errors():
        search(args)
    return 0


if __name__ == '__main__':
    sys.exit(main())
