"""What both networks showed of one batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmstructkd.structures import Targets
from mmstructkd.taps.capture import Capture
from mmstructkd.taps.regions import Regions
from mmstructkd.taps.tap import Tap

__all__ = ['Observation']


@dataclass(frozen=True, eq=False)
class Observation:
    """What both networks showed of a batch.

    Attributes:
        capture: the student's records.
        teacher: the teacher's tensors by tap.
        targets: what the batch knows.
        regions: what the student's RoI head pooled, where it is tapped.
    """

    capture: Capture
    teacher: dict[Tap, list[Tensor]]
    targets: Targets
    regions: Regions | None

    @property
    def student(self) -> dict[Tap, list[Tensor]]:
        """The student's tensors by tap."""
        return self.capture.records
