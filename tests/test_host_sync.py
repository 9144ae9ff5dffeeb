"""Nothing in a step waits for the device: no value is read back, no shape depends on one.

On a CPU reading a value costs nothing, so that these tests run there and count the operators behind which the host
waits on an accelerator.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmstructkd.functional.pairwise_affinity
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.testing import toy_batch, toy_distiller, toy_segmentor
from tests.losses import test_contract as contract

WAITING = {
    '_local_scalar_dense',  # .item(), .tolist(), bool(), float()
    'nonzero',
    'is_nonzero',
    'equal',
    'masked_select',
    'unique_dim',
    'unique_consecutive',
    '_unique2',
    'bincount',
}
INDEXING = {'index', 'index_put', 'index_put_', '_unsafe_index'}
#: Packages whose code a step runs; the innermost of them is who waits.
PACKAGES = ('mmstructkd', 'mmseg', 'mmdet', 'mmcv', 'mmengine')


def who() -> str:
    """Package and line that asked for the operator."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        owner = [package for package in PACKAGES if package in parts]
        if owner:
            return f'{owner[-1]}: {parts[-1]}:{frame.lineno} {frame.line}'
    return 'test'


class Watch(TorchDispatchMode):
    """Notes every operator behind which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._methods = {name: getattr(torch.Tensor, name) for name in ('tolist', 'numpy', 'cpu', '__array__')}

    def __enter__(self) -> Watch:
        for name, method in self._methods.items():  # which read the memory without an operator
            setattr(torch.Tensor, name, self._noting(name, method))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, method)

    def _noting(self, name: str, method: Any) -> Any:
        def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.found.append(f'{name} {who()}')
            return method(tensor, *args, **kwargs)

        return noted

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        by_count = name == 'repeat_interleave' and isinstance(args[-1], torch.Tensor)
        if name in WAITING or by_mask or by_count:
            self.found.append(f'{name} {who()}')
        return func(*args, **dict(kwargs or {}))

    @property
    def own(self) -> list[str]:
        """Those of this package."""
        return [entry for entry in self.found if ' mmstructkd: ' in entry]


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmstructkd.functional.pairwise_affinity, '_looks_are_free', lambda tensor: False)


@pytest.mark.parametrize('labelled', [False, True], ids=['plain', 'labelled'])
@contract.every
def test_losses_do_not_wait(name: str, labelled: bool) -> None:
    loss = contract.build(name)
    loss.eval = loss.train  # the contract scores in eval; a step trains
    targets = None
    if labelled:
        labels = torch.randint(0, 3, (2, 32, 24))
        labels[:, :3] = 255
        targets = Targets(labels=labels, valid=labels != 255, num_classes=3, input_size=(32, 24))
    for step in range(2):
        student, teacher = contract.pair(name)
        with Watch() as watch:
            contract.parts(loss, student, teacher, targets)[1].backward()
        assert step == 0 or not watch.own  # what is read once, at the first step, is free


def test_a_wide_closed_form_does_not_wait() -> None:
    student, teacher = torch.randn(1, 80, 12, 24, requires_grad=True), torch.randn(1, 96, 12, 24)
    with Watch() as watch:
        mmstructkd.functional.pairwise_affinity.pairwise_affinity_loss(
            student, teacher, kernel_size=1, form='closed'
        ).backward()
    assert not watch.own
    assert student.grad.any()


@pytest.mark.parametrize('options', [dict(), dict(dtype='bf16', channels_last=True)], ids=['plain', 'cheap'])
def test_a_step_of_the_distiller_does_not_wait(options: dict) -> None:
    """The student's own code is not this package's: mmseg reads its accuracy in each step."""
    teacher = dict(config=toy_segmentor(8, data_preprocessor=dict(mean=None, std=None)), allow_random=True, **options)
    teacher['config'].data_preprocessor.update(type='SegDataPreProcessor', size=(48, 64))
    model = MODELS.build(toy_distiller(teacher=teacher)).train()
    batch = toy_batch()
    batch['data_samples'][0].set_metainfo(dict(img_shape=(40, 60)))  # padding has to be found
    for step in range(2):
        with Watch() as watch:
            losses = model(**batch, mode='loss')
            sum(value for name, value in losses.items() if 'loss' in name).backward()
        assert step == 0 or not watch.own


def test_the_watch_sees_what_it_must() -> None:
    tensor = torch.tensor([1.0, 0.0])
    with Watch() as watch:
        bool(tensor[0] > 0)
        tensor.tolist()
        tensor[tensor > 0]
        tensor.nonzero()
        tensor[torch.tensor([0])]
    assert [entry.split()[0] for entry in watch.found] == [
        '_local_scalar_dense',
        'tolist',
        'index',
        'nonzero',
    ]
    assert not watch.own
    assert 'noted' not in torch.Tensor.tolist.__name__
