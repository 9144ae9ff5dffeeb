"""Builds terms: from their configs, and then, once both networks were probed, what depends on sizes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.connectors import build_connector, width_of
from mmstructkd.errors import ConfigError, check_finite_number, prefix_errors
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.taps import Regions, Tap
from mmstructkd.tasks.targets import head_at
from mmstructkd.terms.diagnosis import (
    check_confidence,
    check_images_first,
    check_log_probabilities,
    check_one_channel,
    check_same_bins,
    check_task_labels_positions,
    explain_misfit,
    other_classes,
)
from mmstructkd.terms.matching import (
    Classes,
    Heads,
    Records,
    compares_classes,
    is_binary_pair,
    order_by_size,
    tensor_names,
    widths_in_classes,
)
from mmstructkd.terms.reading import build_loss, check_keys, connector_classes
from mmstructkd.terms.term import Level, Term

__all__ = ['ProbedNetworks', 'fit_to_probe', 'parse_terms']


def parse_terms(terms: Any, owner: str = 'StructuredDistiller') -> nn.ModuleDict:
    """Build the terms of a config.

    Args:
        terms: dict of dicts by name.
        owner: whose they are, for messages.

    Returns:
        The terms by name.

    Raises:
        ConfigError: not a dict, an unknown key, a missing one, or a name that
            cannot be logged.
    """
    if not isinstance(terms, Mapping) or not terms:
        raise ConfigError(
            f'{owner}: `terms` must be a dict of terms by name, got {terms!r}. '
            "Example: terms=dict(pixel=dict(tap='decode_head.conv_seg', loss=dict(...)))."
        )
    built = nn.ModuleDict()
    for name, config in terms.items():
        check_keys(name, config, owner)
        built[name] = Term(name, **config)
        check_finite_number(f'term {name!r}', 'loss_weight', built[name].loss.loss_weight, minimum=0)
    return built


@dataclass(frozen=True, eq=False)
class ProbedNetworks:
    """What a term learns of both networks from the probe.

    Attributes:
        student: records of the student.
        teacher: records of the teacher.
        classes: number of classes of student and teacher.
        targets: what the batches of this task know.
        regions: what RoI heads pooled in the probe.
        student_network: the student.
        teacher_network: the teacher's network, where it has one.
        teacher_learned: the teacher's weights mean something. Those of a random one
            are not asked whether they agree with the ground truth.
        teacher_tap: the term's first tap of the teacher as ``teacher_network`` names
            it; ``None``: as the term does.
    """

    student: Records
    teacher: Records
    classes: Classes
    targets: Targets
    regions: Regions
    student_network: nn.Module | None = None
    teacher_network: nn.Module | None = None
    teacher_learned: bool = True
    teacher_tap: Tap | None = None


def fit_to_probe(term: Term, probed: ProbedNetworks) -> None:
    """Build a term's connectors and sized losses from the probe, and try the loss once.

    Args:
        term: the term; changed in place.
        probed: what the probe saw.

    Raises:
        ConfigError: the teacher has other classes, a head does not predict
            what the loss compares, the connector cannot be built, or labels
            are asked for that the task has not.
        ShapeError: the loss cannot take these shapes.
        TapError: levels cannot be matched.
    """
    student, teacher, classes, targets = probed.student, probed.teacher, probed.classes, probed.targets
    check_task_labels_positions(term, targets)
    heads = (
        head_at(probed.student_network, term.student_taps[0].module),
        head_at(probed.teacher_network, (probed.teacher_tap or term.teacher_taps[0]).module),
    )
    with prefix_errors(f'term {term.name!r}'):
        notes = term.loss.check_heads(*heads)
    for note in notes:
        print_log(f'term {term.name!r}: {note}', 'current', level=logging.WARNING)
    check_log_probabilities(term)
    taps = (term.student_taps[0], probed.teacher_tap or term.teacher_taps[0])
    check_confidence(term, (probed.student_network, probed.teacher_network), taps, heads)
    if not probed.teacher_learned:
        term.depth_checks_left = 0
    kind = _connector_class(term)
    term.joint = kind is not None and getattr(kind, 'joint', False)
    tensors = term.tensors(student, teacher)
    names_s, names_t = tensor_names(term.student_taps, student), tensor_names(term.teacher_taps, teacher)
    by_size = term.match != 'order' and not term.on_regions
    if by_size and not (term.joint and len(tensors[0]) == 1):
        term.teacher_order = order_by_size(f'term {term.name!r}', *tensors, (names_s, names_t))
        tensors = term.tensors(student, teacher)
    pairs = term.pairs(student, teacher)
    images = 1 if targets.images is None else len(targets.images)
    check_images_first(term, 'student', term.student_taps, student, images)
    check_images_first(term, 'teacher', term.teacher_taps, teacher, images)
    if term.teacher_order is not None:
        left = [name for place, name in enumerate(names_t) if place not in term.teacher_order]
        if left:
            print_log(f'term {term.name!r}: of the teacher {left} have no level of the student; left out.', 'current')
        names_t = [names_t[place] for place in term.teacher_order]

    def explained(pair: tuple[Tensor, Tensor]) -> Any:
        return explain_misfit(term, *pair, classes, targets.input_size)

    levels = [tensors] if term.joint else [([one], [other]) for one, other in pairs]
    term.connectors = nn.ModuleList([_build_connector(term, *level, classes, heads) for level in levels])
    with explained(pairs[0]):
        term.attach(probed.teacher_network)
    term.connectors.eval()  # one small image makes no batch statistics, and draws count from the first step
    with torch.no_grad(), explained(pairs[0]):
        made = term.comparable(*tensors, targets.input_size)
    term.connectors.train()
    more = [build_loss(f'term {term.name!r}', term.loss_config, term.where) for _ in made[1:]]
    term.losses = nn.ModuleList([term.loss, *more])
    for loss, (made_s, made_t), pair in zip(term.losses, made, (pairs * len(made))[: len(made)], strict=True):
        check_one_channel(term, made_s, made_t, classes, heads, targets)
        with explained(pair):
            loss.bind(made_s, made_t)
    names_t += names_t[-1:] * (len(names_s) - len(names_t))
    term.levels = tuple(
        Level(
            name_s,
            name_t,
            tuple(feat_s.shape),
            tuple(feat_t.shape),
            _name_of(term.connectors[0 if term.joint else place]),
        )
        for place, (name_s, name_t, (feat_s, feat_t)) in enumerate(zip(names_s, names_t, pairs, strict=False))
    )
    term.by_class = compares_classes(term.loss, pairs[0], classes, heads, connected=term.connector_config is not None)
    check_same_bins(term, pairs[0], heads)
    with explained(pairs[0]):
        term.log_keys = _try_loss(term, probed)


def _name_of(connector: nn.Module) -> str:
    """Class of a connector, in words."""
    return 'none' if isinstance(connector, nn.Identity) else type(connector).__name__


def _try_loss(term: Term, probed: ProbedNetworks) -> tuple[str, ...]:
    """Compute the loss on copies of the probe, where shapes that do not fit fail; return its log keys."""
    twin = copy.deepcopy(term).eval()
    taps = ((term.student_taps, probed.student), (term.teacher_taps, probed.teacher))
    copies = [{tap: [t.detach().clone() for t in records[tap]] for tap in side} for side, records in taps]
    with torch.enable_grad():
        for tensors in copies[0].values():
            for tensor in tensors:
                tensor.requires_grad_(True)
        return tuple(twin(*copies, probed.targets, probed.regions, all_parts=True))


def _connector_class(term: Term) -> type | None:
    """Class of the configured connector; ``None`` where it is automatic."""
    config = term.connector_config
    if isinstance(config, (list, tuple)):
        return MODELS.get('mmstructkd.SequentialConnector')
    return connector_classes(config)[0]


def _build_connector(
    term: Term, student: list[Tensor], teacher: list[Tensor], classes: Classes, heads: Heads
) -> nn.Module:
    """The configured connector, or the automatic one."""
    wide_s, wide_t = ([width_of(tensor) for tensor in side] for side in (student, teacher))
    widths: dict[str, Any] = {'in_channels': wide_s, 'out_channels': wide_t}
    if not term.joint:
        widths = {name: width[0] for name, width in widths.items()}
    first = (wide_s[0], wide_t[0])
    # A sigmoid's channel and a softmax's two are made comparable by the loss.
    binary = term.loss.binary_pairs and is_binary_pair(first, heads)
    differ = wide_s != wide_t and not binary
    scores = widths_in_classes(first, classes) == classes and classes[0] != classes[1]
    if differ and scores and not getattr(term.loss, 'maps_classes', False) and term.loss.needs_equal_channels:
        raise other_classes(term, classes)
    if term.connector_config is None:
        needed = differ and term.loss.needs_equal_channels
        return MODELS.build({'type': 'mmstructkd.ConvConnector', **widths}) if needed else nn.Identity()
    config = term.connector_config
    if isinstance(config, (list, tuple)):
        config = {'type': 'mmstructkd.SequentialConnector', 'connectors': list(config)}
    return build_connector(f'term {term.name!r}', config, wide_s, wide_t)
