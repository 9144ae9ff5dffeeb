"""How the planes of a scene lie."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmstructkd.functional.virtual_normal import check_camera, check_triangle, virtual_normal_loss
from mmstructkd.losses.depth_base import SampledDepthLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['VirtualNormalLoss']


@MODELS.register_module()
class VirtualNormalLoss(SampledDepthLoss):
    """Planes through three far-apart points shall lie in the student's scene as in the teacher's.

    Virtual Normal (arXiv:1907.12209), with the teacher's depth for the ground
    truth. See :func:`~mmstructkd.functional.virtual_normal.virtual_normal_loss` for the
    formula. Tap the depth maps. The authors add it to a cross-entropy over depth
    bins with a weight of 6. It says nothing about scale: give it a regression
    beside it.

    Pixels count where the teacher has a reading, labelled or not
    (``where='inside'``): teaching beyond the ground truth is what it is for.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        num_triplets: how many triplets to draw from each image in each step.
        focal_length: in pixels of the network's *input*, one number or
            (f_x, f_y); brought to the map's grid by ``targets.input_size``, without
            which it is in pixels of the map. ``None``: from ``field_of_view``.
        field_of_view: horizontal, in degrees between 0 and 180.
        min_distance: metres; triplets with two points nearer to each other (in
            the teacher's scene) do not count.
        min_angle: degrees, below 60; triangles with a sharper corner do not count.
        seed: of the draw. Draw and step counter are the loss's own, and saved
            with it: the global random streams stay as they are.
        min_depth: metres; pixels that the teacher sees nearer do not count.
        max_depth: metres; pixels that it sees further off do not count.
            ``None``: no limit.
        where: ``'inside'`` the image, or only ``'labelled'`` or ``'unlabelled'``
            pixels (``targets.depth``); see
            :class:`~mmstructkd.losses.depth_base.DepthLoss`.
        teacher_output: ``'depth'``, ``'disparity'`` (one over depth; turned into
            depth) or the ``'same'`` as the student, see there.

    Shape:
        - student, teacher: :math:`(B, 1, H, W)`; the teacher is detached.
        - output: scalar in [0, 2 sqrt(3)], no unit, 0 with a graph where no
          triplet counts.

    Raises:
        ConfigError: an argument is out of range, or ``where`` asks for ground
            truth that the batch has not.
        ShapeError: the maps are no depth maps, or differ in shape.

    Example:
        >>> import torch
        >>> depth = torch.rand(2, 1, 8, 8) * 10 + 1
        >>> VirtualNormalLoss(num_triplets=100)(2 * depth, depth).item() < 1e-5
        True
    """

    transfers = 'normals of planes in the scene'
    paper = 'Enforcing Geometric Constraints of Virtual Normal (arXiv:1907.12209)'

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        num_triplets: int = 10000,
        focal_length: float | Sequence[float] | None = None,
        field_of_view: float = 60.0,
        min_distance: float = 0.6,
        min_angle: float = 30.0,
        seed: int = 0,
        min_depth: float = 0.0,
        max_depth: float | None = None,
        where: str = 'inside',
        teacher_output: str = 'depth',
    ) -> None:
        super().__init__(
            loss_weight,
            seed=seed,
            min_depth=min_depth,
            max_depth=max_depth,
            where=where,
            teacher_output=teacher_output,
        )
        owner = type(self).__name__
        self.focal_length = check_camera(owner, focal_length, field_of_view)
        check_triangle(owner, min_distance, min_angle)
        self.num_triplets = self._check_number('num_triplets', num_triplets)
        self.field_of_view = float(field_of_view)
        self.min_distance = float(min_distance)
        self.min_angle = float(min_angle)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        student, teacher, valid = self.prepare(student, teacher, targets)
        return virtual_normal_loss(
            student,
            teacher,
            triplets=self.draw(student, self.num_triplets, 3),
            focal_length=self._focal_at((student.shape[-2], student.shape[-1]), targets.input_size),
            field_of_view=self.field_of_view,
            min_distance=self.min_distance,
            min_angle=self.min_angle,
            valid=valid,
        )

    def _focal_at(self, size: tuple[int, int], input_size: tuple[int, int] | None) -> tuple[float, float] | None:
        """Focal lengths in pixels of a map of ``size``."""
        if self.focal_length is None or input_size is None:
            return self.focal_length
        return (self.focal_length[0] * size[1] / input_size[1], self.focal_length[1] * size[0] / input_size[0])

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        camera = (
            f'field_of_view={self.field_of_view:g}'
            if self.focal_length is None
            else f'focal_length={self.focal_length}'
        )
        return f'{super().extra_repr()}, num_triplets={self.num_triplets}, {camera}'
