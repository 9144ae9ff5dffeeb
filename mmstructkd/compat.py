"""Every work-around for the mm packages and for torch, with its reason.

:func:`install` puts all of them in place. It runs when the distillers are
imported, and first of all in ``tools/train.py`` and ``tools/test.py``: a config
with ``mmseg::`` bases is read before any ``custom_imports`` is. Where the
package is merely imported, this module is as soon as there is a runner, and with
it runs :func:`patch_mmengine`: a plain config that names mmstructkd reads and
writes as safely. All of it may run any number of times.
"""

from __future__ import annotations

import functools
import os
import tempfile
import types
from collections.abc import Callable
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import mmengine.runner
import mmengine.runner.checkpoint
import mmengine.runner.runner
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.fileio import FileClient, LocalBackend, get_file_backend
from mmengine.fileio.backends import BaseStorageBackend
from mmengine.fileio.file_client import HardDiskBackend
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from mmstructkd.checkpoints import IN_CONFIG, allow_plain_types, consented, load_url, plain_types, read_file, trusts
from mmstructkd.errors import ConfigError
from mmstructkd.weights import check_place

__all__ = ['install', 'pad_value', 'patch_mmengine', 'prepare_cpu_distributed', 'swaps_channels']

# Marks a function that stands in front of one of mmengine's, so that no second one is put before it.
_MARK = '_mmstructkd_wraps'
_ASKS = '_mmstructkd_asks'


def install() -> None:
    """Put every work-around of this module in place; again is harmless."""
    map_mmseg_configs()
    patch_mmengine()
    let_cpu_ops_take_bf16()


def patch_mmengine() -> None:
    """Put those in place that change mmengine alone, for a process that need not have mmcv."""
    read_safely()
    ask_config_for_consent()
    look_before_loading()
    save_atomically()
    remove_after_saving()
    let_models_prepare_runner()


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


# --- data preprocessors --------------------------------------------------------------------------------------


def swaps_channels(preprocessor: nn.Module) -> bool:
    """Tell whether a data preprocessor turns BGR into RGB (or back).

    mmengine and mmdet keep it in ``_channel_conversion``, and so does mmseg of
    the onedl line; mmseg of the openmmlab line keeps it in ``channel_conversion``.
    """
    private = getattr(preprocessor, '_channel_conversion', False)
    return bool(getattr(preprocessor, 'channel_conversion', private))


def pad_value(preprocessor: nn.Module) -> float:
    """Return what a data preprocessor pads with, after normalisation.

    mmseg pads with its ``pad_val`` on both lines, mmengine and mmdet with ``pad_value``.
    """
    return float(getattr(preprocessor, 'pad_val', getattr(preprocessor, 'pad_value', 0)))


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


def _beside(target: Path) -> Path:
    """Return an unused name in the folder of ``target``, for what is renamed to it later."""
    handle, name = tempfile.mkstemp(prefix=f'.{target.name}.', suffix='.part', dir=target.parent)
    os.close(handle)
    return Path(name)


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
        # A link stays a link: what it points to is replaced.
        target = Path(os.path.realpath(filename))
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _beside(target)
        try:
            original(checkpoint, str(part), file_client_args, backend_args)
            with part.open('rb') as stream:
                os.fsync(stream.fileno())
            mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
            part.chmod(mode)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    setattr(save_checkpoint, _MARK, original)
    return save_checkpoint


def _umask() -> int:
    """Return the mask of new files: mkstemp makes them for the owner alone, a checkpoint is as any file."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
    """Let ``CheckpointHook`` drop old checkpoints after the new one is written.

    With ``max_keep_ckpts=1``, and for each new best checkpoint, it removes the
    old file first: a crash while the new one is written would leave none.
    """
    for name in ('_save_checkpoint_with_step', '_save_best_checkpoint'):
        original = getattr(CheckpointHook, name, None)
        if original is not None and not hasattr(original, _MARK):
            setattr(CheckpointHook, name, _removing_later(original))


def _removing_later(original: Callable) -> Callable:
    @functools.wraps(original)
    def method(self: CheckpointHook, *args: Any, **kwargs: Any) -> None:
        if not hasattr(self, 'file_backend'):  # a validation without training, which has nothing to remove
            original(self, *args, **kwargs)
            return
        backend = self.file_backend
        later = self.file_backend = _RemoveLater(backend)
        try:
            original(self, *args, **kwargs)
        finally:
            self.file_backend = backend
        # One step may be saved twice under one name; what stands there now is new.
        current = {self.last_ckpt, getattr(self, 'best_ckpt_path', None)}
        current.update((getattr(self, 'best_ckpt_path_dict', None) or {}).values())
        later.finish({str(path) for path in current if path})

    setattr(method, _MARK, original)
    return method


# --- running -------------------------------------------------------------------------------------------------


def let_models_prepare_runner() -> None:
    """Call ``model.prepare_runner(runner)`` once, when the runner's hooks are registered.

    mmengine gives a model no way to ask for hooks. A distiller needs them to
    keep what it promises, also where a config of the user's names nothing but
    ``custom_imports``.
    """
    original = Runner.register_hooks
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def register_hooks(self: Runner, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        prepare = getattr(model, 'prepare_runner', None)
        if callable(prepare) and not getattr(self, '_mmstructkd_prepared', False):
            self._mmstructkd_prepared = True
            prepare(self)

    setattr(register_hooks, _MARK, original)
    Runner.register_hooks = register_hooks


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


def _bf16_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.device.type == 'cpu'


def prepare_cpu_distributed(cfg: Config, launcher: str) -> None:
    """Make several processes without any accelerator work through Runner.

    mmengine selects a CUDA device while it starts the processes, and hands
    ``device_ids`` to ``DistributedDataParallel``, which a module on the CPU
    refuses. So the gloo group is made here, before the Runner, and the wrapper
    gets ``device_ids=None``; its other settings stay those of mmengine.
    Nothing happens with one process, or where there is an accelerator.

    Args:
        cfg: the config, changed in place.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.

    Raises:
        ConfigError: the launcher is not ``'pytorch'``, or it did not set its
            environment variables.
    """
    if launcher == 'none' or get_device() != 'cpu':
        return
    if launcher != 'pytorch':
        raise ConfigError(
            f"prepare_cpu_distributed: `launcher` must be 'pytorch' where there is no GPU, got {launcher!r}. "
            'Start the processes with torchrun.'
        )
    absent = [
        name for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ
    ]
    if absent:
        raise ConfigError(
            f"prepare_cpu_distributed: `launcher` 'pytorch' must come with {', '.join(absent)} in the environment, "
            'got none. Start with `torchrun --nproc_per_node=2 tools/train.py CONFIG --launcher pytorch`.'
        )
    if not is_distributed():
        torch.distributed.init_process_group('gloo')
    wrapper = dict(cfg.get('model_wrapper_cfg') or {})
    if not wrapper:
        # What mmengine passes when it is given no config of the wrapper; DDP's own defaults differ.
        wrapper = {
            'type': 'MMDistributedDataParallel',
            'broadcast_buffers': False,
            'find_unused_parameters': cfg.get('find_unused_parameters', False),
        }
    wrapper.setdefault('device_ids', None)
    cfg.model_wrapper_cfg = wrapper


patch_mmengine()  # see the package's own docstring: who imports it gets the promises that concern mmengine alone
