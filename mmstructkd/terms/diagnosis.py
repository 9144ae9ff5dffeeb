"""Why a pair of tapped tensors does not fit, in words that say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from mmstructkd.connectors.tokens import grid_of
from mmstructkd.errors import CheckpointError, ConfigError, ShapeError, TapError
from mmstructkd.structures import Targets
from mmstructkd.taps import Tap
from mmstructkd.terms.matching import Classes, Heads, Records, is_binary_pair, scores_of_other_classes
from mmstructkd.terms.reading import connector_classes
from mmstructkd.terms.term import Term

__all__ = [
    'check_confidence',
    'check_images_first',
    'check_log_probabilities',
    'check_one_channel',
    'check_same_bins',
    'check_task_labels_positions',
    'explain_misfit',
    'other_classes',
]

#: Parts of a transformer whose rows are queries, not positions.
QUERIES = ('bbox_head', 'panoptic_head', 'decoder', 'transformer_decoder', 'cls_embed', 'mask_embed')


def check_task_labels_positions(term: Term, targets: Targets) -> None:
    """Raise where only labelled positions count and the task labels none."""
    if term.loss.where != 'labelled' or term.loss.needs_labels or term.on_regions:
        return
    if targets.labels is None and targets.depth is None:
        raise ConfigError(
            f"term {term.name!r}: `where` must be 'inside' for a task whose samples label no position (boxes do "
            "not), got 'labelled'. Leave it out, or take a loss that looks at boxes."
        )


def check_images_first(term: Term, side: str, taps: Sequence[Tap], records: Records, images: int) -> None:
    """Refuse what has another axis than the images first: layers of a decoder, or positions of a sequence."""
    for tap in taps:
        for tensor in records[tap]:
            shape = tuple(tensor.shape)
            if len(shape) >= 3 and shape[0] != images and shape[1] == images and not term.on_regions:
                raise TapError(
                    f'term {term.name!r}: `{side}` must give the images on its first axis, got {shape} for '
                    f'{images} image at {str(tap)!r}: layers of a decoder, or positions, come first. Tap a module '
                    "of one layer, e.g. 'decoder.layers.5', or one that gives maps."
                )


def check_log_probabilities(term: Term) -> None:
    """Raise where the connector gives log-probabilities to a loss that reads something else from its inputs."""
    making = _probability_makers(term)
    if making and not term.loss.over_classes:
        raise ConfigError(
            f'term {term.name!r}: `loss` must compare distributions over classes behind {making[0].__name__}, '
            f'which gives their logarithms, got {type(term.loss).__name__}. Take PixelwiseKLLoss.'
        )


def check_confidence(term: Term, networks: Sequence[nn.Module | None], taps: Sequence[Tap], heads: Heads) -> None:
    """Raise where a term asks how sure a network is of a position and its tap does not say.

    Args:
        term: the term.
        networks: student and teacher.
        taps: the first tap of each as that network names it.
        heads: the heads that these lie in.

    Raises:
        ConfigError: a tap gives no scores of classes, or a connector hides those of the student.
    """
    if term.confidence is None:
        return
    owner = f'term {term.name!r}'
    both = term.confidence.by == 'both'
    made = bool(_probability_makers(term))  # the connector makes them of what the teacher says
    if both and term.connector_config is not None and not made:
        raise ConfigError(
            f"{owner}: `confidence` must be by='teacher' behind a connector, got by='both'. What a connector makes of "
            "the student's scores are no scores of its own."
        )
    several = len(term.student_taps) > 1 or len(term.teacher_taps) > 1
    for side in ('student', 'teacher') if both else ('teacher',):
        place = ('student', 'teacher').index(side)
        if side == 'teacher' and made:
            continue
        if several or not _gives_class_scores(networks[place], taps[place], heads[place]):
            shown_taps = [str(tap) for tap in (term.student_taps, term.teacher_taps)[place]]
            raise ConfigError(
                f'{owner}: `confidence` must have scores of classes, one tap of them, as `{side}`, got {shown_taps}. '
                "Tap 'decode_head.conv_seg'."
            )


def _gives_class_scores(network: nn.Module | None, tap: Tap, head: nn.Module | None) -> bool:
    """Whether a tap is the output of a head over classes, or of its last layer."""
    channels = getattr(head, 'out_channels', None)
    if network is None or not isinstance(channels, int) or hasattr(head, 'max_depth') or tap.side != 'output':
        return False
    module = network.get_submodule(tap.module)
    return module is head or module is getattr(head, 'conv_seg', None)


def _probability_makers(term: Term) -> list[type]:
    """Classes of the term's connectors that give log-probabilities of classes."""
    kinds = connector_classes(term.connector_config)
    return [kind for kind in kinds if kind is not None and getattr(kind, 'gives_log_probabilities', False)]


def check_one_channel(
    term: Term, student: Tensor, teacher: Tensor, classes: Classes, heads: Heads, targets: Targets
) -> None:
    """Raise where one channel is taken for classes and is none."""
    loss = term.loss
    maps = student.dim() in (2, 4) and teacher.dim() in (2, 4)
    if not maps or 1 not in (widths := (student.shape[1], teacher.shape[1])):
        return
    pairs = loss.by_class or loss.binary_pairs
    if max(widths) > 2 or not (loss.over_classes or (pairs and widths != (1, 1))):
        return  # more than two have an error of their own: other classes
    kind = type(loss).__name__
    if targets.depth is not None:
        raise ConfigError(
            f'term {term.name!r}: `tap` must name scores of classes or bins for {kind}, got one channel of '
            f'{" and ".join(type(head).__name__ for head in heads)}, which is depth. Take a loss on depth '
            "(DepthRegressionLoss), or tap the scores of a head with bins ('decode_head.conv_depth')."
        )
    for owner, head, width in zip(('student', 'teacher'), heads, widths, strict=True):
        known = getattr(head, 'out_channels', None)
        if term.connector_config is None and isinstance(known, int) and known != width:
            raise ConfigError(
                f'term {term.name!r}: `{owner}` must tap the scores of all classes for {kind}, got {width} channel'
                f'{"s" * (width > 1)} where {type(head).__name__} has out_channels={known}.'
            )
    if widths != (1, 1) and not is_binary_pair(widths, heads):
        raise other_classes(term, classes)


def check_same_bins(term: Term, pair: tuple[Tensor, Tensor], heads: Heads) -> None:
    """Raise where bin k of both heads is another depth."""
    bins = [getattr(head, 'to_depth', None) for head in heads]
    facts = [tuple(getattr(one, fact, None) for fact in ('num_bins', 'min_depth', 'max_depth')) for one in bins]
    scores = all(
        None not in (number, *ends) and tensor.dim() > 1 and tensor.shape[1] == number
        for (number, *ends), tensor in zip(facts, pair, strict=True)
    )
    loss = term.loss
    by_channel = loss.over_classes or loss.by_class or loss.needs_equal_channels or getattr(loss, 'bins', None)
    if by_channel and scores and facts[0] != facts[1]:
        shown = [f'{number} bins from {near:g} to {far:g} m' for number, near, far in facts]
        raise ConfigError(
            f'term {term.name!r}: the heads must have the same bins for {type(loss).__name__}, got {shown[0]} '
            f'of the student and {shown[1]} of the teacher: bin k is another depth. Tap the depth map '
            "('decode_head.to_depth') for a loss on depth, or give both heads the same range."
        )


def other_classes(term: Term, classes: Classes) -> ConfigError:
    """The error for logits over other classes."""
    return ConfigError(
        f'term {term.name!r}: the teacher must have the classes of the student, got num_classes={classes[1]} '
        f'for the teacher and {classes[0]} for the student. '
        'Tap a feature instead of the logits, or map the classes with `class_map` of a loss that has it.'
    )


@contextlib.contextmanager
def explain_misfit(
    term: Term, student: Tensor, teacher: Tensor, classes: Classes, input_size: tuple[int, int] | None
) -> Iterator[None]:
    """Put the term's name into errors of its loss and connectors, and the reason where it is known.

    Args:
        term: the term.
        student: the student's tapped tensor.
        teacher: the teacher's.
        classes: numbers of classes of both networks.
        input_size: (h, w) of the student's input, where it is known.

    Yields:
        Nothing.
    """
    try:
        yield
    except ShapeError as err:
        if scores_of_other_classes(student, teacher, classes, are_scores=bool(_probability_makers(term))):
            raise other_classes(term, classes) from err
        raise ShapeError(f'term {term.name!r}: {err}{_about_tokens(term, student, teacher, input_size)}') from err
    except (ConfigError, CheckpointError) as err:
        raise type(err)(f'term {term.name!r}: {err}') from err
    except Exception as err:  # torch and parts of others raise whatever they trip over
        raise ConfigError(
            f'term {term.name!r}: `loss` and `connector` must be able to take the tapped tensors, got '
            f'{tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher. '
            f'{type(err).__name__}: {err}'
        ) from err


def _about_tokens(term: Term, student: Tensor, teacher: Tensor, input_size: tuple[int, int] | None) -> str:
    """How a transformer's tokens become what most losses take."""
    sides = [name for name, tensor in (('student', student), ('teacher', teacher)) if tensor.dim() == 3]
    if not sides or term.on_regions:
        return ''
    names = [part for tap in (*term.student_taps, *term.teacher_taps) for part in tap.module.split('.')]
    queries = any(part in QUERIES for part in names)
    numbers = [tensor.shape[1] for tensor in (student, teacher) if tensor.dim() == 3]
    if queries or not all(_covers_image(number, input_size) for number in numbers):
        which = ' and the '.join(sides)
        return f' The {which} gave rows (B, N, C) that lie nowhere in the image (queries): tap a map.'
    return (
        f' The {" and the ".join(sides)} gave tokens (B, N, C): lay them out as a map with '
        "connector=dict(type='mmstructkd.TokensToMapConnector')."
    )


def _covers_image(tokens: int, input_size: tuple[int, int] | None) -> bool:
    """Whether so many tokens, with a class token or without, make a grid over the image; queries do not."""
    if input_size is None:
        return True
    return any(grid_of(number, *input_size) is not None for number in (tokens, tokens - 1) if number > 0)
