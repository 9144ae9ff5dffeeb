"""One queue of the teacher's vectors for each class.

Shape shorthand: C classes, M slots a class, D entries a vector, n vectors handed over.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from mmstructkd.arguments import checked
from mmstructkd.errors import ConfigError, ShapeError, check_count, shown
from mmstructkd.functional.core.sampling import draw

__all__ = ['ClassQueue']

#: 8 GB in float32, on every device and in every checkpoint.
MAX_NUMBERS = 2**31


@checked
class ClassQueue(nn.Module):
    """First in, first out, class by class; the same in all processes.

    Differs from the queues of CIRKD's released code: a vector goes to the queue
    of its own class (there, pixels are taken from the beginning of the image,
    whatever their class); a full queue goes on at its beginning, vector by
    vector (there, the last slots are written over and the rest of the turn is
    lost); and a slot counts only once it is filled (there, queues begin with
    random vectors). What processes hand over is gathered in the order of their
    ranks, so that their queues stay alike.

    Pushing and sampling never wait for the device. All state is in buffers:
    vectors, how many there are, and where the next one goes.

    Args:
        num_classes: C.
        capacity: M.
        channels: D.

    Raises:
        ConfigError: an argument is no integer above 0.

    Example:
        >>> queue = ClassQueue(num_classes=2, capacity=3, channels=1)
        >>> queue.push(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[True, True], [False, True]]))
        >>> queue.filled.tolist(), queue.keys[1, 0].item()
        ([2, 1], 4.0)
    """

    slots: Tensor
    filled: Tensor
    pointer: Tensor

    def __init__(self, num_classes: int, capacity: int, channels: int) -> None:
        super().__init__()
        for name, value in (('num_classes', num_classes), ('capacity', capacity), ('channels', channels)):
            check_count('ClassQueue', name, value)
        if num_classes * capacity * channels > MAX_NUMBERS:
            raise ConfigError(
                f'ClassQueue: `capacity` times `num_classes` and `channels` must be at most {MAX_NUMBERS}, '
                f'got {shown(capacity)}, {shown(num_classes)} and {shown(channels)}.'
            )
        self.num_classes = num_classes
        self.capacity = capacity
        self.channels = channels
        # The last row takes what has no place, so that every push writes the same number of rows.
        self.register_buffer('slots', torch.zeros(num_classes * capacity + 1, channels))
        self.register_buffer('filled', torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer('pointer', torch.zeros(num_classes, dtype=torch.int64))

    @property
    def keys(self) -> Tensor:
        """All slots, (C, M, D), filled or not: a view."""
        return self.slots[:-1].view(self.num_classes, self.capacity, self.channels)

    @torch.no_grad()
    def push(self, vectors: Tensor, valid: Tensor) -> None:
        """Append vectors, in order; of more than M of a class the last M stay.

        In a distributed run all processes must call this, with as many vectors.

        Args:
            vectors: shape (C, n, D), any float dtype.
            valid: which are there, bool (C, n).

        Raises:
            ShapeError: the shapes do not fit the queue.
        """
        wanted = (self.num_classes, vectors.shape[1] if vectors.dim() == 3 else -1, self.channels)
        if tuple(vectors.shape) != wanted or tuple(valid.shape) != wanted[:2]:
            raise ShapeError(
                f'ClassQueue: `vectors` and `valid` must have shapes ({self.num_classes}, n, {self.channels}) and '
                f'({self.num_classes}, n), got {tuple(vectors.shape)} and {tuple(valid.shape)}.'
            )
        vectors = _gather(vectors.detach().to(self.slots))
        valid = _gather(valid.to(self.slots.device, torch.uint8)).bool()
        total = valid.sum(dim=1, keepdim=True)
        rank = valid.cumsum(dim=1) - 1
        stays = valid & (rank >= total - self.capacity)
        first = torch.arange(self.num_classes, device=valid.device)[:, None] * self.capacity
        place = first + (self.pointer[:, None] + rank) % self.capacity
        nowhere = self.slots.shape[0] - 1
        self.slots.index_copy_(0, torch.where(stays, place, nowhere).flatten(), vectors.flatten(0, 1))
        self.slots[nowhere].zero_()
        self.pointer.copy_((self.pointer + total[:, 0]) % self.capacity)
        self.filled.copy_((self.filled + total[:, 0]).clamp(max=self.capacity))

    @torch.no_grad()
    def sample(self, amount: int, step: Tensor | int) -> tuple[Tensor, Tensor]:
        """Draw filled slots of each class, without replacement.

        Args:
            amount: how many of each class; M where that is less.
            step: which draw it is; the same step draws the same slots, in every
                process.

        Returns:
            Copies of the vectors (C, amount, D), and which of them are there
            (C, amount): a class may hold fewer.
        """
        slot = torch.arange(self.capacity, device=self.slots.device)
        index, there = draw(slot < self.filled[:, None], amount, step)
        keys = self.keys.gather(1, index[..., None].expand(-1, -1, self.channels))
        return keys, there

    def extra_repr(self) -> str:
        """Show the sizes in the model's print-out."""
        return f'num_classes={self.num_classes}, capacity={self.capacity}, channels={self.channels}'


def _gather(tensor: Tensor) -> Tensor:
    """Join what all processes hold along axis 1, in the order of their ranks."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor)
    return torch.cat(parts, dim=1)
