"""Every work-around for the mm packages and for torch, with its reason.

:func:`install` puts all of them in place. It runs when the distillers are
imported, and first of all in ``tools/train.py`` and ``tools/test.py``: a config
with ``mmseg::`` bases is read before any ``custom_imports`` is. All of it may
run any number of times.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import re
import tempfile
import urllib.error
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import mmengine.runner
import mmengine.runner.checkpoint
import mmengine.runner.runner
import numpy as np
import torch
from mmcv.ops import RoIAlign
from mmcv.ops.nms import NMSop
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.fileio import FileClient, LocalBackend, get_file_backend
from mmengine.fileio.backends import BaseStorageBackend
from mmengine.fileio.file_client import HardDiskBackend
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mmstructkd.errors import CheckpointError, ConfigError, suggest

__all__ = [
    'install',
    'local_checkpoint',
    'pad_value',
    'prepare_cpu_distributed',
    'read_checkpoint',
    'swaps_channels',
]

# Marks a function that stands in front of one of mmengine's, so that no second one is put before it.
_MARK = '_mmstructkd_wraps'


def install() -> None:
    """Put every work-around of this module in place; again is harmless."""
    map_mmseg_configs()
    allow_plain_types()
    save_atomically()
    remove_after_saving()
    let_models_prepare_runner()
    let_cpu_ops_take_bf16()
    keep_narrow_bf16_convolutions_right()


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


def history_method(owner: Any, name: str) -> Callable:
    """Stand in for ``getattr`` when a checkpoint is read: statistics of ``HistoryBuffer`` only.

    mmengine's message hub pickles its statistics methods, and Python pickles a
    method as ``getattr(class, name)``. Allowing the real ``getattr`` would let
    a file reach any attribute of any allowed object, and so run code.

    Args:
        owner: what the file takes the attribute from.
        name: the attribute.

    Returns:
        The method of ``HistoryBuffer``.

    Raises:
        pickle.UnpicklingError: it is anything else.
    """
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'GLOBAL getattr was not an allowed global by default. ({owner!r}, {name!r})')
    return getattr(HistoryBuffer, name)


def plain_types() -> list:
    """Return what checkpoints of mmengine hold besides tensors, for ``weights_only=True``.

    The message hub's buffers, and numpy arrays, scalars and dtypes, under the
    module names of numpy 1 and of numpy 2. Nothing among it runs code.

    Returns:
        The entries for ``torch.serialization.add_safe_globals``.
    """
    # Under its old name numpy 2 warns; under its new one numpy 1 has none.
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    numpy_functions = [
        (function, f'numpy.{core}.multiarray.{function.__name__}')
        for function in (multiarray._reconstruct, multiarray.scalar)
        for core in ('core', '_core')
    ]
    kinds = ['bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64']
    kinds += ['float16', 'float32', 'float64', 'str', 'bytes']
    dtypes = list(dict.fromkeys(type(np.dtype(kind)) for kind in kinds))
    return [
        HistoryBuffer,
        (history_method, 'builtins.getattr'),
        np.ndarray,
        np.dtype,
        slice,
        *dtypes,
        *numpy_functions,
    ]


def allow_plain_types() -> None:
    """Let mmengine resume from its own checkpoints with ``weights_only=True``.

    From torch 2.6 on that is the default. The openmmlab line then refuses its
    message hub; the onedl line allows ``getattr`` for it, and for anything else
    it meets it falls back, silently, to a load that runs what the file says.
    With :func:`plain_types` allowed neither happens for a checkpoint of ours.
    """
    torch.serialization.add_safe_globals(plain_types())
    if hasattr(mmengine.runner.checkpoint, 'get_torch_safe_globals'):
        mmengine.runner.checkpoint.get_torch_safe_globals = plain_types


def read_checkpoint(path: str | os.PathLike, *, trust: bool = False, map_location: Any = 'cpu') -> dict:
    """Read a checkpoint without running what it may contain.

    Args:
        path: see :func:`local_checkpoint`.
        trust: read a file that needs more than plain types; this runs whatever
            code the file holds.
        map_location: where tensors go, as for ``torch.load``.

    Returns:
        The content.

    Raises:
        CheckpointError: there is no such file; it is truncated, no checkpoint,
            or a pointer of Git LFS; it needs a class or function that is not
            allowed (named in the message); it holds something else than a dict.
    """
    file = local_checkpoint(path)
    _check_looks_whole(file)
    allow_plain_types()
    try:
        content = torch.load(file, map_location=map_location, weights_only=not trust)
    except pickle.UnpicklingError as err:
        raise CheckpointError(_refusal(file, str(err), trust)) from err
    except Exception as err:
        # Damage shows in as many ways as there are places in a file: from here on it is all one error.
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise CheckpointError(
            f'read_checkpoint: {str(file)!r} must be a whole checkpoint of torch, got one that cannot be read '
            f'({type(err).__name__}: {reason}). It is truncated or damaged; copy or download it again.'
        ) from err
    if not isinstance(content, dict):
        raise CheckpointError(
            f'read_checkpoint: {str(file)!r} must hold a dict of weights, got {type(content).__name__}. '
            'Save `model.state_dict()`, not the model itself.'
        )
    return content


def _check_looks_whole(file: str) -> None:
    """Raise the errors that a look at the first bytes can name better than torch."""
    with open(file, 'rb') as stream:
        head = stream.read(64)
    if not head:
        raise CheckpointError(f'read_checkpoint: {file!r} must be a checkpoint, got an empty file. Download it again.')
    if head.startswith(b'version https://git-lfs.github.com/spec/'):
        raise CheckpointError(
            f'read_checkpoint: {file!r} must be a checkpoint, got a pointer of Git LFS. Run `git lfs pull` beside it.'
        )
    if head.lstrip()[:1] == b'<':
        raise CheckpointError(
            f'read_checkpoint: {file!r} must be a checkpoint, got a web page. The address leads to a page; '
            'use the one of the file itself.'
        )
    # A zip archive (torch >= 1.6), a pickle of protocol 2 or later (before that), or a tar archive (before 0.1.10).
    if not (head.startswith((b'PK\x03\x04', b'\x80')) or head[:60].rstrip(b'\0').startswith(b'sys_info')):
        raise CheckpointError(
            f'read_checkpoint: {file!r} must be a checkpoint of torch, got a file that begins with {head[:16]!r}. '
            'Give the .pth file that training wrote.'
        )


def _refusal(file: str, reason: str, trust: bool) -> str:
    """Say what a refused file asked for."""
    asked = re.search(r'GLOBAL (\S+)', reason)
    if asked is None or trust:
        detail = reason.split('WeightsUnpickler error:')[-1].strip().splitlines()
        return (
            f'read_checkpoint: {file!r} must be a whole checkpoint of torch, got one that cannot be read '
            f'({detail[0] if detail else "a damaged pickle"}). It is damaged, or needs more than weights; '
            'download it again, or save only its `state_dict`.'
        )
    return (
        f'read_checkpoint: {file!r} must hold weights and plain values only, got one that needs {asked[1]!r}, '
        'which could run code. If you know who made it, read it with trust_checkpoint=True; '
        'better, save only its `state_dict` in a new file.'
    )


def local_checkpoint(path: str | os.PathLike) -> str:
    """Return the local file of a checkpoint, after downloading it where needed.

    Names of the model zoos come from mmengine's own tables. A download appears
    under its final name only when it is whole; the file is kept in torch's hub
    folder, which mmengine uses as well. Each process of a distributed run may
    download for itself.

    Args:
        path: local path (``~`` allowed), ``http(s)://``, ``file://``,
            ``open-mmlab://name`` or ``torchvision://name``.

    Returns:
        Path of a file that exists.

    Raises:
        CheckpointError: there is no such file or name, or it cannot be fetched.
    """
    name = os.fspath(path)
    scheme, separator, rest = name.partition('://')
    if not separator or len(scheme) == 1:
        return _existing(name)
    if scheme in ('open-mmlab', 'openmmlab'):
        table = mmengine.runner.checkpoint.get_external_models()
        rest = mmengine.runner.checkpoint.get_deprecated_model_names().get(rest, rest)
        target = _look_up(name, rest, table)
        home = mmengine.runner.checkpoint._get_mmengine_home()
        # The user's own table in that folder may name files beside it.
        return _download(target) if '://' in target else _existing(os.path.join(home, target))
    if scheme in ('torchvision', 'modelzoo'):
        return _download(_look_up(name, rest, _torchvision_models()))
    if scheme in ('http', 'https', 'file'):
        return _download(name)
    raise CheckpointError(
        f'local_checkpoint: `path` must be a file, an http(s) address, open-mmlab://NAME or torchvision://NAME, '
        f'got {name!r}. Download it and give the path.'
    )


def _existing(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        raise CheckpointError(
            f'local_checkpoint: `path` must be a file, got the folder {name!r}. Name the checkpoint in it.'
        )
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob('*.pth')) if path.parent.is_dir() else []
        hint = suggest(path.name, beside) if beside else 'There is no .pth file in that folder.'
        raise CheckpointError(f'local_checkpoint: `path` must be a file that exists, got {name!r}. {hint}')
    return str(path)


def _look_up(name: str, key: str, table: dict[str, str]) -> str:
    if key not in table:
        raise CheckpointError(
            f"local_checkpoint: `path` must name a model of mmengine's table, got {name!r}. {suggest(key, table)}"
        )
    return table[key]


def _torchvision_models() -> dict[str, str]:
    try:
        return mmengine.runner.checkpoint.get_torchvision_models()
    except ImportError:
        # There is no build of torchvision for every torch; the table of its release 0.12 comes with mmengine.
        return mmengine.load(str(Path(mmengine.__file__).parent / 'hub' / 'torchvision_0.12.json'))


def _download(url: str) -> str:
    file_name = url.split('?')[0].rstrip('/').rsplit('/', 1)[-1]
    if not re.search(r'-[0-9a-f]{8,}\.\w+$', file_name):
        # Only a name with a hash in it stands for one content: every other is kept apart by its address.
        file_name = f'{hashlib.sha256(url.encode()).hexdigest()[:12]}-{file_name}'
    target = Path(torch.hub.get_dir(), 'checkpoints', file_name)
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _beside(target)
        try:
            torch.hub.download_url_to_file(url, str(part), progress=os.isatty(2))
            part.replace(target)
        except (urllib.error.URLError, OSError, ValueError) as err:
            raise CheckpointError(
                f'local_checkpoint: {url!r} must be reachable, got {type(err).__name__}: {err}. '
                'Download it elsewhere and give the path.'
            ) from err
        finally:
            part.unlink(missing_ok=True)
    return str(target)


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
        backend = getattr(self, 'file_backend', None)
        if backend is None:  # of a validation alone, which saves nothing: the hook gets it when a training begins
            original(self, *args, **kwargs)
            return
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
