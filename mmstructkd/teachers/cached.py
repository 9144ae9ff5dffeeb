"""A teacher whose outputs are kept on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmstructkd.errors import ConfigError
from mmstructkd.structures import Blend, Targets
from mmstructkd.taps import Capture, Regions, Tap, in_point_head, in_region_head
from mmstructkd.teachers.base import ProbedTensors, Records, Repeatable, TeacherSource, check_one_batch
from mmstructkd.teachers.cache import TeacherCache, hash_of, preprocessing
from mmstructkd.teachers.wrapper import TeacherWrapper

__all__ = ['CachedTeacher']


class CachedTeacher(TeacherWrapper):
    """Shows what a teacher has once shown of an image; asks it for the images that are not there.

    A batch goes to the :class:`~mmstructkd.teachers.cache.TeacherCache`, and from
    there the images that miss go to :meth:`Repeatable.observe_each` of the teacher
    itself.

    Args:
        wrapped: a teacher whose outputs are a function of the image alone, paced
            or not.
        cache: where they are kept.

    Raises:
        ConfigError: the teacher shows something that the image alone does not
            decide; the message says what.

    Attributes:
        cache: as given; ``None`` after :meth:`without_cache`.
    """

    def __init__(self, wrapped: TeacherSource, cache: TeacherCache) -> None:
        super().__init__(wrapped)
        self.cache: TeacherCache | None = cache
        # Before the first probe, which may fold weights.
        self._identity = self._fingerprint = self._live(str(cache.store.folder)).fingerprint()

    def _live(self, folder: str = '') -> Repeatable:
        """The teacher itself, that shows an image as if it were alone."""
        live = self.wrapped.repeatable()
        if isinstance(live, str):
            owner = type(self.wrapped.unwrapped).__name__
            raise ConfigError(f'{owner}: `cache` must be left out, got folder={folder!r}. {live}')
        return live

    @property
    def hooks(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the wrapped teacher, and one that looks at the pipeline."""
        return (*self.wrapped.hooks, 'TeacherCacheHook')

    def attach(self, student: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        """Introduce the wrapped teacher to the student; both normalisations decide what it shows.

        Args:
            student: the student, with its data preprocessor.
            config: its config.

        Raises:
            ConfigError: the student's preprocessor changes batches at random.
        """
        super().attach(student, config)
        live = self._live()
        assert live.network is not None
        of_student = preprocessing(student.data_preprocessor, f'{type(live).__name__}: `cache`')
        of_teacher = preprocessing(live.network.data_preprocessor)
        self._identity = hash_of([self._fingerprint, of_student, of_teacher])

    def probe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records | None = None,
        targets: Targets | None = None,
        regions: Regions | None = None,
    ) -> Capture | ProbedTensors:
        """Probe the wrapped teacher, and refuse taps whose tensors cannot be kept image by image.

        Args:
            inputs: a small batch in the student's normalisation.
            data_samples: one per image, or ``None``.
            taps: every tap that will be asked for.
            student: the student's tensors.
            targets: what the batches of the task know.
            regions: what RoI and point heads look at.

        Returns:
            What the wrapped teacher returns.

        Raises:
            ConfigError: a tap shows what the student chooses or draws in each step,
                or the teacher shows something else of the same image each time.
        """
        taps = tuple(taps)
        seen = super().probe(inputs, data_samples, taps, student=student, targets=targets, regions=regions)
        if self.cache is None:
            return seen
        live = self._live()
        owner = type(live).__name__
        inside = [str(tap) for tap in taps if in_region_head(tap)]
        if inside:
            raise ConfigError(
                f'{owner}: `cache` must be left out where a RoI head is tapped, got {inside[0]!r}: what it '
                'shows depends on the regions that the student chooses in each step.'
            )
        assert live.network is not None
        drawing = [str(tap) for tap in taps if in_point_head(live.network, tap)]
        if drawing:
            raise ConfigError(
                f'{owner}: `cache` must be left out where a point head is tapped, got {drawing[0]!r}: what '
                'it shows depends on the points that the student draws in each step.'
            )
        self.cache.check_probe(seen.records, inputs.shape[1:])
        live.check_repeatable(inputs, data_samples, taps)
        return seen

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
        """Return the tensors at ``taps`` from files as far as they are there, else from the teacher.

        Args:
            inputs: a batch in the student's normalisation, shape (B, 3, H, W).
            data_samples: one per image, or ``None``.
            taps: taps that were probed.
            student: not used by what can be kept.
            regions: not used by what can be kept.
            labelled: not used by what can be kept.

        Returns:
            For each tap its tensors, float32, without graph.
        """
        if self.cache is None:
            return super().observe(inputs, data_samples, taps, student=student, regions=regions, labelled=labelled)
        taps, live = tuple(dict.fromkeys(taps)), self._live()
        check_one_batch(type(live).__name__, inputs)
        return self.cache.serve(
            hash_of([self._identity, *live.run_state(inputs.device)]),
            inputs,
            data_samples,
            taps,
            lambda images, samples: live.observe_each(images, samples, taps),
            whole=live.wants_whole_batches,
        )

    def observe_stream(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records,
        plain: Records,
        blend: Blend | None = None,
    ) -> dict[Tap, list[Tensor]]:
        """As :meth:`observe`: what can be kept is a function of the images."""
        return self.observe(inputs, data_samples, taps, student=student, labelled=False)

    def without_cache(self) -> None:
        """Ask the teacher for each batch from now on, and write nothing."""
        self.cache = None
        super().without_cache()

    def report(self) -> list[str]:
        """What the cache gave."""
        return [*super().report(), *([] if self.cache is None else [self.cache.report()])]
