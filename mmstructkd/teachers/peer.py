"""A network that learns beside the student, and from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, check_flag
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.taps import Capture, Regions, Tap, probe_regions
from mmstructkd.tasks.targets import head_of, num_classes_of
from mmstructkd.teachers.base import Records
from mmstructkd.teachers.constraint import build_constraints
from mmstructkd.teachers.loading import build_network, load_weights
from mmstructkd.teachers.normalization import InputConversion
from mmstructkd.teachers.trained import TrainedTeacher
from mmstructkd.terms import ProbedNetworks, fit_to_probe, parse_terms

__all__ = ['PeerTeacher']


@MODELS.register_module()
class PeerTeacher(TrainedTeacher):
    """Another network that trains at the same time, with the task and with terms of its own.

    Deep mutual learning (arXiv:1706.00384) where both learn the task and from each
    other; ProKT (arXiv:2107.09305) where the peer learns the task and is held near
    the student, which learns from the peer alone. Its ``terms`` are ordinary terms
    with the roles swapped: a tap's ``student`` side is the peer, its ``teacher``
    side the student. Both networks are evaluated at the same parameters and updated
    together; the authors of ProKT step the teacher first, so that their student sees
    it one step later.

    A peer is trained and never exported with the student;
    ``tools/export_student.py --which teacher`` exports it instead.

    Args:
        config: path of a config, ``mmseg::...``, or an inline dict.
        checkpoint: where it starts; every parameter must come from it. ``None``: as
            its own config initialises it.
        trust_checkpoint: allow a checkpoint whose reading runs code.
        terms: terms by name, from the student to it.
        constraints: by the name of a term the arguments of a
            :class:`~mmstructkd.teachers.constraint.Constraint`: the term is held below
            a bound by a multiplier that is learned, in place of a fixed weight (the
            dual form of ProKT). The multiplier is logged.
        zero_classifier: begin with the layers ``conv_seg`` of both networks at 0, so
            that both predict all classes alike, as ProKT does. Weights that are loaded
            into the student later (``load_from``) take its place.
        task_weight: factor of its task losses.
        task_schedule: config of a :class:`WeightSchedule` for that factor.
        optimizer: config of an optimiser of its own; ``None``: it goes with the
            student's settings.

    Raises:
        ConfigError: no such config, or a term cannot be built.
        CheckpointError: the checkpoint does not give every parameter.
    """

    def __init__(
        self,
        config: str | Mapping[str, Any],
        checkpoint: str | None = None,
        *,
        trust_checkpoint: bool = False,
        terms: Mapping[str, Any] | None = None,
        constraints: Mapping[str, Any] | None = None,
        zero_classifier: bool = False,
        task_weight: float = 1.0,
        task_schedule: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(task_weight, task_schedule)
        owner = type(self).__name__
        self.config = config if isinstance(config, str) else 'inline'
        self.checkpoint = checkpoint
        self.hash: str | None = None
        network = build_network(config, owner, pretrained=checkpoint is None)
        if checkpoint is None:
            network.init_weights()
            print_log(f'{owner}: the network starts as its config initialises it.', 'current')
        else:
            self.hash = load_weights(network, checkpoint, owner=owner, trust_checkpoint=trust_checkpoint)
        check_flag(owner, 'zero_classifier', zero_classifier)
        self.zero_classifier = zero_classifier
        if zero_classifier:
            _set_to_zero(network, owner, 'its own network')
        network.train()
        self.trained = nn.Module()
        self.trained.network = network
        self.trained.terms = parse_terms(terms, 'PeerTeacher') if terms else nn.ModuleDict()
        self.trained.constraints = build_constraints(constraints, self.trained.terms, owner)
        self._adopt(self.trained)
        self.reads = tuple(dict.fromkeys(tap for term in self.terms.values() for tap in term.teacher_taps))
        if optimizer is not None and (not isinstance(optimizer, Mapping) or 'type' not in optimizer):
            raise ConfigError(f'{owner}: `optimizer` must be a dict with a `type`, got {optimizer!r}.')
        self.own_optimizer = None if optimizer is None else dict(optimizer)
        self._convert: InputConversion | None = None

    def _adopt(self, trained: nn.Module) -> None:
        self.network = trained.network
        self.terms = trained.terms
        self._constraints: nn.ModuleDict = trained.constraints

    def attach(self, student: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        """Derive the conversion between the two normalisations.

        Args:
            student: the student.
            config: not used.
        """
        assert self.network is not None
        self._student = [student]  # in a list: not owned
        self._convert = InputConversion(student.data_preprocessor, self.network.data_preprocessor)
        for term in self.terms.values():
            for tap in term.teacher_taps:
                tap.resolve(student, f'{type(self).__name__}, term {term.name!r}: `teacher` (the student here)')
        if self.zero_classifier:
            _classifiers(student, type(self).__name__, 'the student')

    def begin(self, student: nn.Module) -> None:
        """Set the student's classifier to 0, where that is asked for."""
        if self.zero_classifier:
            _set_to_zero(student, type(self).__name__, 'the student')

    def _own_taps(self) -> list[Tap]:
        """What its terms tap of it."""
        return [tap for term in self.terms.values() for tap in term.student_taps]

    def probe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records | None = None,
        targets: Targets | None = None,
        regions: Regions | None = None,
    ) -> Capture:
        """Run it in eval, and let its terms build what depends on sizes."""
        assert self.network is not None
        assert self._convert is not None
        taps = tuple(dict.fromkeys([*taps, *self._own_taps()]))
        self._check_taps(taps)
        capture = self._try(self._convert(inputs, data_samples), self._convert.samples(inputs, data_samples), taps)
        some = probe_regions(len(inputs), tuple(inputs.shape[-2:]))
        classes = (num_classes_of(head_of(self.network)), num_classes_of(head_of(self._student[0])))
        for term in self.terms.values():
            probed = ProbedNetworks(
                student=capture.records,
                teacher=student or {},
                classes=classes,
                targets=targets or Targets(),
                regions=some,
                student_network=self.network,
                teacher_network=self._student[0],
                teacher_learned=False,  # the student learns in this training
            )
            fit_to_probe(term, probed)
        return capture

    def observe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records | None = None,
        regions: Regions | None = None,
        labelled: bool = True,
    ) -> dict[Tap, list[Tensor]]:
        """Run it on its own normalisation of the batch."""
        assert self._convert is not None
        images = self._convert(inputs, data_samples)
        samples = self._convert.samples(inputs, data_samples)
        active = [tap for term in self.terms.values() if term.active for tap in term.student_taps]
        return self._run(images, samples, tuple(dict.fromkeys([*taps, *active])), labelled)

    def objectives(self, student: Records, targets: Targets) -> dict[str, Any]:
        """Its task losses, and what its terms ask of it; the student's side is detached by each loss."""
        losses = super().objectives(student, targets)
        records, self._records = self._records, {}
        for term in self.terms.values():
            scored = term(records, student, targets, None)
            if term.active and term.name in self._constraints:
                constraint = self._constraints[term.name]
                losses[f'teacher_multiplier_{term.name}'] = constraint.multiplier.clone()
                scored[f'loss_kd_{term.name}'] = constraint(scored[f'loss_kd_{term.name}'])
            losses.update({f'teacher_{name}': value for name, value in scored.items()})
        return losses

    def provenance(self) -> dict[str, Any]:
        """Config, checkpoint it started from, and its SHA-256."""
        return {
            'type': type(self).__name__,
            'config': self.config,
            'checkpoint': None if self.checkpoint is None else str(self.checkpoint),
            'sha256': self.hash,
        }


def _classifiers(network: nn.Module, owner: str, whose: str) -> list[nn.Conv2d]:
    """The last layer of each segmentation head that counts.

    Raises:
        ConfigError: there is none.
    """
    heads = getattr(network, 'decode_head', None)
    heads = list(heads) if isinstance(heads, nn.ModuleList) else [heads]
    found = [getattr(head, 'conv_seg', None) for head in heads]
    layers = [layer for layer in found if isinstance(layer, nn.Conv2d)]
    if len(layers) < len(heads):
        raise ConfigError(
            f'{owner}: `zero_classifier` must be False for a network without a layer `decode_head.conv_seg`, got True '
            f'and {type(network).__name__} as {whose}. Only there does 0 mean that all classes are alike.'
        )
    return layers


def _set_to_zero(network: nn.Module, owner: str, whose: str) -> None:
    """Let a segmentor predict all classes alike."""
    for layer in _classifiers(network, owner, whose):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
