"""Random streams of a process and of its data workers, and loaders that go on where they stopped.

A training that is to be resumed bit for bit needs more than weights: the state
of every random stream, which batch comes next, and what the workers that make
batches have drawn so far. A worker runs ahead of the training, so its state is
sent along with each batch: what counts is the state behind the last batch that
was used.
"""

from __future__ import annotations

import itertools
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

__all__ = ['Follower', 'Point', 'random_states', 'restore_random_states', 'track_loader']

_END = object()


def random_states() -> dict[str, Any]:
    """Return the global random streams of this process, as plain values and tensors; of CUDA its own device's."""
    return {
        **_plain(_host_streams()),
        'cuda': [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put the streams of this process back to what :func:`random_states` returned.

    Args:
        states: from any process; CUDA's stream is left alone where there is none.
    """
    kind, keys, position, has_gauss, cached = states['numpy']
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = states['python']
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states['torch'].cpu())
    if states.get('cuda') and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'][0].cpu())


def _host_streams() -> tuple[Any, Any, bytes]:
    """The streams of numpy, Python and torch, quick to pickle."""
    return np.random.get_state(), random.getstate(), torch.get_rng_state().numpy().tobytes()


def _plain(streams: tuple[Any, Any, bytes]) -> dict[str, Any]:
    """The same as what a checkpoint may hold."""
    (kind, keys, position, has_gauss, cached), (version, words, gauss), torch_state = streams
    return {
        'torch': torch.frombuffer(bytearray(torch_state), dtype=torch.uint8),
        'numpy': [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        'python': [version, list(words), gauss],
    }


@dataclass
class Point:
    """Where a loader is to go on.

    Attributes:
        batches: how many to leave out, from the beginning of a pass.
        workers: what each worker of the run that stopped had drawn; empty, or
            ``None`` for one: as it is seeded.
        turn: which of them makes the next batch of the pass.
        restarted: whether persistent workers had been started anew once. A hook
            that did it asks for it again when it is resumed.
        next_pass: called where ``batches`` goes beyond a pass; ``None``: it must not.
        arrived: called when the next batch is the right one, before it is loaded.
    """

    batches: int
    workers: Sequence[dict[str, Any] | None] = ()
    turn: int = 0
    restarted: bool = False
    next_pass: Callable[[], None] | None = None
    arrived: Callable[[], None] | None = None

    def arrive(self) -> None:
        """Call ``arrived``, once."""
        arrived, self.arrived = self.arrived, None
        if arrived is not None:
            arrived()


@dataclass
class Follower:
    """What is known of the batches that a loader has handed over.

    Attributes:
        turn: which worker makes the next batch of this pass.
        restarted: whether persistent workers were started anew, because their
            pipeline was changed.
        point: where the coming pass is to begin; ``None``: at the beginning.
        deferred: begin the coming pass with its first batch, not before.
    """

    turn: int = 0
    restarted: bool = False
    point: Point | None = None
    deferred: bool = False
    _streams: list[bytes | dict[str, Any] | None] = field(default_factory=list)
    _indices: Iterator[Any] | None = None

    def note(self, worker: int, streams: bytes) -> None:
        """Note what a worker had drawn behind a batch."""
        self._streams[worker] = streams
        self.turn = (worker + 1) % len(self._streams)

    @property
    def workers(self) -> list[dict[str, Any] | None]:
        """What each worker has drawn; ``None``: it has made no batch yet."""
        return [_plain(pickle.loads(s)) if isinstance(s, bytes) else s for s in self._streams]


class _Parcel(NamedTuple):
    """A batch on its way from a worker, with the worker's streams behind it; without them it is no batch."""

    batch: Any
    worker: int
    streams: bytes


class _Packing:
    """Collates as before, and in a worker packs what it has drawn with the batch."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Any) -> Any:
        worker = get_worker_info()
        if worker is not None and isinstance(samples, list) and not samples:
            return _Parcel(None, worker.id, b'')
        batch = self._collate(samples)
        return batch if worker is None else _Parcel(batch, worker.id, pickle.dumps(_host_streams()))


class _Restoring:
    """Seeds a worker, and gives it the streams of the one whose place it takes."""

    def __init__(self, seeding: Callable[[int], None] | None, workers: Sequence[dict[str, Any] | None]) -> None:
        self._seeding, self._workers = seeding, list(workers)

    def __call__(self, worker: int) -> None:
        if self._seeding is not None:
            self._seeding(worker)
        states = self._workers[worker]
        if states is not None:
            restore_random_states(states)


class _Indices:
    """A sampler whose coming pass may have been begun already."""

    def __init__(self, sampler: Any, follower: Follower) -> None:
        self._sampler, self._follower = sampler, follower

    def __iter__(self) -> Iterator[Any]:
        # Torch asks twice for the first pass and uses the second answer: nothing may happen before the first index.
        begun, self._follower._indices = self._follower._indices, None
        yield from (iter(self._sampler) if begun is None else begun)

    def __len__(self) -> int:
        return len(self._sampler)


class _Pass:
    """One pass through a loader: unpacks the batches."""

    def __init__(self, begin: Callable[[], Iterator[Any]], follower: Follower) -> None:
        self._begin, self._follower = begin, follower
        self._batches: Iterator[Any] | None = None

    def begin(self) -> None:
        """Start loading."""
        self._batches = self._begin()

    def __iter__(self) -> _Pass:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self.begin()
        item = next(self._batches)  # type: ignore[arg-type]
        while isinstance(item, _Parcel) and not item.streams:
            item = next(self._batches)  # type: ignore[arg-type]
        if not isinstance(item, _Parcel):
            return item
        self._follower.note(item.worker, item.streams)
        return item.batch


class _Waiting:
    """Stands for the workers of a resumed loader until they are started."""


class _FollowedLoader(DataLoader):
    """A loader with a :class:`Follower`; see :func:`follow`."""

    follower: Follower

    @property
    def _index_sampler(self) -> Any:
        return _Indices(super()._index_sampler, self.follower)

    def __iter__(self) -> Any:
        one = _Pass(self._begin, self.follower)
        if not self.follower.deferred:
            one.begin()
        self.follower.deferred = False
        return one

    def continue_at(self, point: Point) -> None:
        """Begin the coming pass elsewhere.

        Args:
            point: where.
        """
        self.follower.point = point
        if self.persistent_workers:
            # A hook that sets this to None before the pass asks for fresh workers, as it would of running ones.
            self._iterator = _Waiting()  # type: ignore[assignment]

    def _begin(self) -> Iterator[Any]:
        """Start a pass."""
        follower = self.follower
        point, follower.point = follower.point, None
        fresh = not self.persistent_workers or self._iterator is None
        if point is None:
            if fresh:
                follower.restarted = self.persistent_workers and bool(follower._streams)
                follower._streams = [None] * self.num_workers
            follower.turn = 0
            return super().__iter__()
        restart = self.persistent_workers and fresh and not point.restarted
        self._iterator = None
        follower._indices, ended = self._leave_out(point)
        follower._streams, follower.turn = [None] * self.num_workers, 0
        follower.restarted = restart or point.restarted
        seeding = self.worker_init_fn
        if restart:
            point.arrive()  # workers are started with the next number of the process's own stream
        elif point.workers:
            follower._streams = list(point.workers)
            self.worker_init_fn = _Restoring(seeding, point.workers)
            if self.batch_sampler is not None and not ended:
                # Torch gives the first batch to the first worker. Those whose turn is over get one of no images.
                follower._indices = itertools.chain(([] for _ in range(point.turn)), follower._indices)
                follower.turn = point.turn
        try:
            batches = super().__iter__()
        finally:
            self.worker_init_fn = seeding
        point.arrive()
        return batches

    def _leave_out(self, point: Point) -> tuple[Iterator[Any], bool]:
        """The indices from ``point`` on, and whether these are none."""
        sampler = super()._index_sampler
        left = point.batches
        while True:
            before = left
            indices = iter(sampler)
            while left and next(indices, _END) is not _END:
                left -= 1
            if not left or point.next_pass is None or left == before:
                break
            point.next_pass()
        first = _END if left else next(indices, _END)
        return (iter(()), True) if first is _END else (itertools.chain([first], indices), False)


def track_loader(loader: Any, *, deferred: bool = False) -> Any:
    """Let a loader know where it stands, and go on there later.

    Batches, their order and all random numbers stay what they are.

    Args:
        loader: a ``DataLoader`` that was not iterated yet, changed in place.
        deferred: begin the first pass with its first batch. mmengine before
            0.10.12 begins it, and lets workers run ahead, before it knows
            where to resume.

    Returns:
        The loader; one that is no ``DataLoader`` of torch is returned as it is.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader, _FollowedLoader):
        return loader
    kind = type(loader)
    loader.__class__ = type(kind.__name__, (_FollowedLoader, kind), {'__module__': kind.__module__})
    loader.follower = Follower(deferred=deferred)  # type: ignore[attr-defined]
    loader.collate_fn = _Packing(loader.collate_fn)
    return loader
