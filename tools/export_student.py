"""Export the student of a distilled run: a plain checkpoint, and ONNX.

The file holds ``state_dict`` and ``meta`` (the student's own config as text,
``dataset_meta``) and nothing else. It is written beside its final name, loaded
by mmseg's or mmdet's own function and compared with the source bit for bit, and
renamed when all of that holds: a failed export leaves no file. A checkpoint of
a run with an EMA holds the averaged weights already; these are exported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as torch_functional
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmstructkd import compat
from mmstructkd.checkpoints import ON_COMMAND_LINE, read_checkpoint, trusts
from mmstructkd.distillers.plain_config import plain_config
from mmstructkd.errors import CheckpointError, ConfigError, ShapeError, TapError
from mmstructkd.evaluation.cost import all_tensors, multiply_adds, parameter_count
from mmstructkd.files import whole_file
from mmstructkd.hooks.student_checkpoint import KEY
from mmstructkd.tasks.batches import input_size, synthetic_batch
from mmstructkd.tasks.targets import task_of
from mmstructkd.teachers.loading import build_network, load_student, model_config, own_name, student_config
from mmstructkd.teachers.normalization import swaps_channels

KEYS = {'state_dict', 'meta'}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Export the student of a distilled run as a plain checkpoint.')
    parser.add_argument('config', help='path of the config: the distilling one or the plain one')
    parser.add_argument('checkpoint', help='checkpoint of the run')
    parser.add_argument(
        '--which',
        choices=('student', 'teacher'),
        default='student',
        help='the student, or the network that learned beside it (PeerTeacher)',
    )
    parser.add_argument('--out', required=True, help='the checkpoint to write')
    parser.add_argument('--onnx', help='also write the logits at the size of the input as ONNX (segmentors, depth)')
    parser.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help='size of the input (default: that of training)'
    )
    parser.add_argument('--opset', type=int, default=17, help='version of the ONNX operators')
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-4,
        help='largest difference of ONNX Runtime to torch, as a part of the largest logit (at least of 1)',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides, key=value')
    parser.add_argument(
        '--trust-checkpoint', action='store_true', help='read a checkpoint that needs more than weights; may run code'
    )
    args = parser.parse_args(argv)
    if args.size is not None and min(args.size) < 1:
        parser.error('--size must be above 0')
    if not (math.isfinite(args.tolerance) and args.tolerance > 0):
        parser.error('--tolerance must be a finite number above 0')
    return args


# --- the checkpoint ------------------------------------------------------------------------------------------


def plain_values(value: Any) -> Any:
    """Turn numpy values into Python's, so that any torch reads the file with ``weights_only=True``."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {plain_values(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain_values(v) for v in value)
    return value


def plain_checkpoint(model: BaseModel, cfg: Config, source: dict) -> dict[str, Any]:
    """Gather what the exported file holds.

    Args:
        model: the student with its weights.
        cfg: the student's config.
        source: the checkpoint of the run.

    Returns:
        ``state_dict`` and ``meta``.
    """
    meta: dict[str, Any] = {'cfg': cfg.pretty_text}
    known = source.get('meta') or {}
    if known.get('dataset_meta') is not None:
        meta['dataset_meta'] = plain_values(known['dataset_meta'])
    return {'meta': meta, 'state_dict': {key: value.clone() for key, value in model.state_dict().items()}}


def load_as_users_do(cfg: Config, path: Path, framework: str) -> nn.Module:
    """Build the student from its config by the function that mmseg or mmdet has for it."""
    cfg = Config.fromstring(cfg.pretty_text, '.py')  # as they find it in the file
    if framework == 'mmdet':
        from mmdet.apis import init_detector

        return init_detector(cfg, str(path), device='cpu')
    from mmseg.apis import init_model

    return init_model(cfg, str(path), device='cpu')


def outputs_of(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """Run ``mode='tensor'`` in eval and flatten what it gives."""
    model.eval()  # which need not return the model
    with torch.no_grad():
        return all_tensors(model(batch['inputs'], batch['data_samples'], mode='tensor'))


def verify(path: Path, cfg: Config, reference: BaseModel, batch: dict[str, Any]) -> None:
    """Load the exported file into the student's own config and compare it with the source.

    Args:
        path: the exported file.
        cfg: the student's config.
        reference: the student with the weights of the run.
        batch: a random input.

    Raises:
        CheckpointError: something else is in the file, a key does not match,
            or a weight or an output differs in a bit.
    """
    content = torch.load(path, map_location='cpu', weights_only=True)
    if set(content) != KEYS:
        raise CheckpointError(f'verify: the exported file must hold {sorted(KEYS)}, got {sorted(content)}.')
    model = load_as_users_do(cfg, path, 'mmdet' if task_of(reference) == 'det' else 'mmseg')
    own, given = model.state_dict(), content['state_dict']
    missing, unexpected = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or unexpected:
        raise CheckpointError(
            f"verify: the exported file must have every key of the student's config and no other, got "
            f'missing {missing} and unexpected {unexpected}.'
        )
    expected = reference.state_dict()
    for key, value in own.items():
        if not torch.equal(value, expected[key]):
            raise CheckpointError(f'verify: {key!r} must be as in the source, got other values.')
    outputs, wanted = outputs_of(model, batch), outputs_of(reference, batch)
    same = len(outputs) == len(wanted) > 0
    if not same or not all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True)):
        raise CheckpointError('verify: the outputs must equal those of the source bit for bit, got others.')


# --- ONNX ----------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """The student from a normalised image to logits (or depth) at the size of the image.

    Args:
        model: a segmentor or depth estimator.
        size: (H, W) of the image.
    """

    def __init__(self, model: BaseModel, size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.align_corners = bool(getattr(model, 'align_corners', False))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits, shape (B, K, H, W)."""
        logits = self.model(inputs, None, mode='tensor')
        return torch_functional.interpolate(logits, size=self.size, mode='bilinear', align_corners=self.align_corners)


def pooling_matrix(length: int, cells: int) -> Tensor:
    """Matrix (cells, length) that averages as adaptive pooling does along one axis."""
    matrix = torch.zeros(cells, length)
    for cell in range(cells):
        begin, end = cell * length // cells, -(-(cell + 1) * length // cells)
        matrix[cell, begin:end] = 1 / (end - begin)
    return matrix


@contextlib.contextmanager
def adaptive_pooling_as_products() -> Iterator[None]:
    """Write adaptive average pooling as two matrix products where its cells overlap.

    ONNX has no operator for a map whose size its output does not divide, such
    as the 3x3 and 6x6 pooling of PSPNet on a 64x128 map. The sizes are fixed
    in an export, so the cells are.
    """
    original = torch_functional.adaptive_avg_pool2d

    def pool(tensor: Tensor, output_size: Any) -> Tensor:
        height, width = int(tensor.shape[-2]), int(tensor.shape[-1])
        size = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
        rows, columns = (given if given is not None else own for given, own in zip(size, (height, width), strict=True))
        if height % rows == 0 and width % columns == 0:
            return original(tensor, (rows, columns))
        return pooling_matrix(height, rows) @ tensor @ pooling_matrix(width, columns).T

    torch_functional.adaptive_avg_pool2d = pool
    try:
        yield
    finally:
        torch_functional.adaptive_avg_pool2d = original


def check_onnx_possible(model: BaseModel) -> None:
    """Say early what an ONNX export would fail on."""
    absent = [name for name in ('onnx', 'onnxruntime') if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            f'export_student: `--onnx` must find onnx and onnxruntime, got no {" and no ".join(absent)}. '
            f'pip install {" ".join(absent)}'
        )
    if task_of(model) == 'det':
        raise ConfigError(
            f'export_student: `--onnx` must get a segmentor or depth estimator, got {type(model).__name__}. '
            'Boxes need post-processing in the graph: export the plain checkpoint with mmdeploy.'
        )


def export_onnx(model: BaseModel, path: Path, inputs: Tensor, opset: int) -> Logits:
    """Write the student as ONNX, for one image of the given size.

    Args:
        model: the student, in eval.
        path: file to write.
        inputs: a normalised image, shape (1, 3, H, W).
        opset: version of the operators.

    Returns:
        The network that was exported.

    Raises:
        ConfigError: ``mode='tensor'`` gives no single map, or torch cannot
            write one of its operators.
    """
    network = Logits(model, (int(inputs.shape[-2]), int(inputs.shape[-1]))).eval()
    with torch.no_grad():
        given = model(inputs, None, mode='tensor')
    if not isinstance(given, Tensor) or given.dim() != 4:
        raise ConfigError(
            f'export_student: `--onnx` must get a model that gives one map, got {type(given).__name__} of '
            f'{type(model).__name__}. Export the plain checkpoint with mmdeploy.'
        )
    with warnings.catch_warnings(), torch.no_grad(), adaptive_pooling_as_products():
        # Sizes become constants, which is meant; and the exporter that needs no further package is the old one.
        warnings.simplefilter('ignore')
        try:
            torch.onnx.export(
                network,
                (inputs,),
                str(path),
                input_names=['image'],
                output_names=['logits'],
                opset_version=opset,
                dynamo=False,
            )
        except (torch.onnx.errors.OnnxExporterError, ValueError) as err:
            reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
            raise ConfigError(
                f'export_student: `--onnx` must get operators that opset {opset} has, got {reason} '
                'Try another --opset or --size.'
            ) from err
    return network


def compare_onnx(network: nn.Module, path: Path, inputs: Tensor, tolerance: float) -> float:
    """Run the file by ONNX Runtime and compare with torch.

    Args:
        network: what was exported.
        path: the file.
        inputs: a normalised image, another one than the export saw.
        tolerance: see ``--tolerance``.

    Returns:
        The largest difference.

    Raises:
        CheckpointError: it is above the tolerance.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    given = torch.from_numpy(session.run(None, {'image': inputs.numpy()})[0])
    with torch.no_grad():
        wanted = network(inputs)
    largest = float((given - wanted).abs().max()) if given.shape == wanted.shape else math.inf
    allowed = tolerance * max(1.0, float(wanted.abs().max()))
    if not largest <= allowed:
        raise CheckpointError(
            f'compare_onnx: ONNX Runtime must agree with torch to {allowed:.3g}, got a difference of {largest:.3g}. '
            'Raise --tolerance if that is good enough.'
        )
    print(f'onnx      largest difference to torch {largest:.3g} (allowed {allowed:.3g})')
    return largest


# --- complexity ----------------------------------------------------------------------------------------------


def complexity(model: BaseModel, size: tuple[int, int]) -> str:
    """Say how large a model is, and what an image of ``size`` costs."""
    model.eval()
    try:
        cost = f'{multiply_adds(model, size) / 1e9:.3f} G multiply-adds at {size[0]}x{size[1]}'
    except Exception as err:
        # A number for information: a network that cannot be traced is exported all the same.
        cost = f'multiply-adds not counted ({type(err).__name__})'
    return f'{parameter_count(model) / 1e6:.3f} M parameters, {cost}'


def print_complexity(student: BaseModel, cfg: Config, size: tuple[int, int]) -> None:
    """Compare student and teacher."""
    print(f'student   {complexity(student, size)}')
    teacher = cfg.model.get('teacher')
    if cfg.model.get('student') is None or not isinstance(teacher, dict) or 'config' not in teacher:
        return
    try:
        network = build_network(teacher['config'], 'export_student')
    except ConfigError as err:
        print(f'teacher   unknown: {err}')
        return
    print(f'teacher   {complexity(network, size)}')


# --- all of it -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kept_if_good(*targets: Path | None) -> Iterator[list[Path | None]]:
    """Give a name beside each target; rename all of them at the end, or remove them at an error."""
    with contextlib.ExitStack() as stack:
        yield [None if target is None else stack.enter_context(whole_file(target)) for target in targets]


def peer_of(distilling: Config, source: dict, folder: Path) -> tuple[Config, str]:
    """Take the network that learned beside the student out of a checkpoint.

    Args:
        distilling: the config of the run.
        source: its checkpoint.
        folder: where a plain checkpoint of the peer is put.

    Returns:
        The peer's plain config, and the path of that checkpoint.

    Raises:
        ConfigError: the run has no peer.
        CheckpointError: the checkpoint does not hold one.
    """
    teacher = distilling.model.get('teacher') or {}
    if own_name(teacher.get('type')) != 'PeerTeacher':
        raise ConfigError(
            'export_student: `--which teacher` must get a run whose one teacher is a PeerTeacher, got '
            f'{teacher.get("type", "a frozen teacher")!r}. A frozen teacher has a checkpoint of its own.'
        )
    kept = (source.get(KEY) or {}).get('companion') or {}
    begin = 'network.'
    weights = {name.removeprefix(begin): value for name, value in kept.items() if name.startswith(begin)}
    if not weights:
        raise CheckpointError(
            'export_student: the checkpoint must hold what trained beside the student, got none. Give one that the '
            'run itself has saved, not an exported one.'
        )
    cfg = plain_config(distilling)
    cfg.model = model_config(teacher.config, 'export_student', pretrained=False)
    path = folder / 'peer.pth'
    torch.save({'state_dict': weights, 'meta': source.get('meta') or {}}, path)
    return cfg, str(path)


def export(args: argparse.Namespace) -> None:
    """Read, write, verify and print.

    Args:
        args: the command line.
    """
    compat.install()
    MMLogger.get_instance('export_student', logger_name='mmengine', log_level='ERROR')
    try:
        distilling = Config.fromfile(args.config)
    except OSError as err:
        raise ConfigError(f'export_student: `config` must be a readable config, got {args.config!r} ({err}).') from err
    if args.cfg_options is not None:
        distilling.merge_from_dict(args.cfg_options)
    if distilling.get('model') is None:
        raise ConfigError(f'export_student: `config` must define `model`, got keys {sorted(distilling.keys())}.')
    cfg = plain_config(distilling)
    out, onnx = Path(args.out), None if args.onnx is None else Path(args.onnx)
    taken = {Path(args.checkpoint).resolve(), Path(args.config).resolve()}
    for option, target in (('--out', out), ('--onnx', onnx)):
        if target is not None and target.resolve() in taken:
            raise ConfigError(f'export_student: `{option}` must be a file of its own, got {str(target)!r}. Rename it.')
        taken.add(target and target.resolve())

    trust = trusts(distilling, args.trust_checkpoint)
    source = read_checkpoint(args.checkpoint, trust=trust, how=ON_COMMAND_LINE)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if args.which == 'student':
        model = load_student(cfg, args.checkpoint, owner='export_student', trust_checkpoint=trust)
    else:
        with tempfile.TemporaryDirectory() as folder:
            cfg, checkpoint = peer_of(distilling, source, Path(folder))
            model = load_student(cfg, checkpoint, owner='export_student', trust_checkpoint=trust)
    if onnx is not None:
        check_onnx_possible(model)
    size = tuple(args.size) if args.size else input_size(student_config(distilling), model)
    batch = synthetic_batch(model, size, 1, training=False)

    with kept_if_good(out, onnx) as (part, onnx_part):
        torch.save(plain_checkpoint(model, cfg, source), part)
        verify(part, cfg, model, batch)
        if onnx_part is not None:
            network = export_onnx(model, onnx_part, batch['inputs'], args.opset)
            other = synthetic_batch(model, size, 1, seed=1, training=False)
            compare_onnx(network, onnx_part, other['inputs'], args.tolerance)
    averaged = 'ema_state_dict' in source and args.which == 'student'
    kind = 'averaged (EMA) weights' if averaged else 'weights'
    print(f'wrote     {out}: {kind} of the {args.which}, every key matched, outputs equal to the source bit for bit')
    if onnx is not None:
        preprocessor = model.data_preprocessor
        mean, std = (getattr(preprocessor, name, None) for name in ('mean', 'std'))
        order = 'RGB' if swaps_channels(preprocessor) else 'BGR'
        print(f'wrote     {onnx}: image 1x3x{size[0]}x{size[1]} -> logits, opset {args.opset}')
        if mean is not None:
            print(f'          image = ({order} - {mean.flatten().tolist()}) / {std.flatten().tolist()}')
    if args.which == 'student':
        print_complexity(model, distilling, size)


def main(argv: Sequence[str] | None = None) -> int:
    """Export.

    Args:
        argv: arguments; ``None``: the command line's.

    Returns:
        Exit code.
    """
    args = parse_args(argv)
    try:
        export(args)
    except (ConfigError, TapError, ShapeError, CheckpointError) as err:
        print(f'{type(err).__name__}: {err}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
