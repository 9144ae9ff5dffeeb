r"""Select images that a teacher understands, for a student to learn from.

Example::

    python tools/select_images.py configs/teacher.py teacher.pth data/web --out data/web_kept.txt --write-labels

Each image gets an error, and those below the quantile ``--quantile`` of these errors are
kept: cGAN-KD does so with generated images and the teacher's loss, KD3 with images from
the web and confidence.

- ``loss``, with ``--dataset``: mean over the labelled pixels of the cross-entropy, or for
  depth of the distance from the label as a share of the mean of both;
- ``confidence``: 1 less the mean of the largest probability, with ``--student`` of the
  product of both networks' (segmentation only);
- ``flip``: mean divergence of the answers to the image and to its mirror image; for depth
  their distance.

For segmentation the quantile is taken among the images whose most frequent predicted class
is the same, so that no class is lost because it is a hard one. For depth there is one.

``CONFIG`` is the teacher's own (of a distilling config the student is meant). Images are
loaded by the pipeline of its test, or else of its validation: nothing about them is random.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from torch import Tensor, nn

from mmstructkd.checkpoints import trusts
from mmstructkd.errors import ConfigError
from mmstructkd.functional import (
    filter_by_quantile,
    image_mean,
    joint_confidence,
    score_disagreement,
    value_disagreement,
)
from mmstructkd.functional.core.resize import resize_labels
from mmstructkd.functional.core.score_fusion import score_confidence
from mmstructkd.functional.core.scores import label_losses
from mmstructkd.running import Overrides, one_line_errors, read_config
from mmstructkd.tasks.targets import head_of, task_of
from mmstructkd.teachers.loading import build_network, load_weights, student_config

OWNER = 'select_images.py'
ERRORS = ('loss', 'confidence', 'flip')
#: Endings of the files of labels.
SUFFIXES = {'seg': '.png', 'depth': '.npy'}
# mmseg reads labels as 8 bits, and 255 is the one that is ignored.
MOST_CLASSES = 255


class Judged(NamedTuple):
    """What the teacher thinks of an image.

    Attributes:
        path: below the folder of images.
        place: index in the dataset.
        error: NaN where it has no pixel to be judged by.
        group: the most frequent predicted class; 0 for depth.
    """

    path: str
    place: int
    error: float
    group: int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Select images that a teacher understands.')
    parser.add_argument('config', help="the teacher's config")
    parser.add_argument('checkpoint', help="the teacher's")
    parser.add_argument('images', type=Path, help='folder of the images; the list names them below it')
    parser.add_argument('--out', type=Path, required=True, help='the list to write, one path a line')
    parser.add_argument(
        '--quantile', type=float, default=0.7, help='of the errors, below which an image is kept (default: 0.7)'
    )
    parser.add_argument(
        '--by', choices=ERRORS, help='the error (default: loss with --dataset, else confidence, for depth flip)'
    )
    parser.add_argument(
        '--dataset',
        choices=('train', 'val', 'test'),
        help='the images have labels: those of this dataset of CONFIG that lie below IMAGES (default: all of IMAGES, '
        'without labels)',
    )
    parser.add_argument(
        '--student', nargs=2, metavar=('CONFIG', 'CHECKPOINT'), help="multiply its confidence with the teacher's"
    )
    parser.add_argument(
        '--write-labels',
        nargs='?',
        const='',
        metavar='FOLDER',
        help="write the teacher's predictions of the images that are kept (default folder: beside the list)",
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--trust-checkpoint', action='store_true', help='read files that need more than weights')
    parser.add_argument('--cfg-options', nargs='+', action=Overrides, help="overrides of the teacher's, key=value")
    args = parser.parse_args(argv)
    if not 0 < args.quantile <= 1:
        parser.error(f'--quantile must be above 0 and at most 1, got {args.quantile}')
    if args.by == 'loss' and args.dataset is None:
        parser.error('--by loss must come with --dataset, which has the labels')
    return args


def label_folder(args: argparse.Namespace) -> Path:
    """Where predictions are written: the folder of the command line, or one beside the list."""
    return Path(args.write_labels or args.out.with_name(f'{args.out.stem}_labels'))


# --- networks ------------------------------------------------------------------------------------------------------


def load_network(cfg: Config, checkpoint: str, args: argparse.Namespace) -> nn.Module:
    """Build the plain network of a config with its weights, in eval, on the device.

    Args:
        cfg: of the network, or a distilling one, whose student is meant.
        checkpoint: its weights.
        args: the command line.

    Returns:
        The network.

    Raises:
        ConfigError: it is a detector.
        CheckpointError: see :func:`load_weights`.
    """
    plain = student_config(cfg)
    network = build_network({key: plain.get(key) for key in ('model', 'default_scope', 'data_preprocessor')}, OWNER)
    if task_of(network) == 'det':
        raise ConfigError(
            f'{OWNER}: `config` must be of a segmentor or depth estimator, got {type(network).__name__}. The error of '
            'a set of boxes is no number to rank images by, before thresholds of scores and overlaps are chosen.'
        )
    load_weights(network, checkpoint, owner=OWNER, trust_checkpoint=trusts(cfg, args.trust_checkpoint))
    return network.to(args.device).eval()


def predict(network: nn.Module, sample: Mapping[str, Any], *, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Predict one image at its original size.

    Args:
        network: in eval.
        sample: of a dataset: ``inputs``, (3, H, W), and ``data_samples``.
        mirrored: show its mirror image, and turn the answer back. The image is mirrored before it is padded, so
            that padding stays where the network removes it.

    Returns:
        What it says, (1, C, H, W): logits or metres; and the predicted classes, (H, W), or metres once more.
    """
    image = sample['inputs'].flip(-1) if mirrored else sample['inputs']
    preprocess: Any = network.data_preprocessor
    data = preprocess({'inputs': [image], 'data_samples': [copy.deepcopy(sample['data_samples'])]}, False)
    (found,) = network(data['inputs'], data['data_samples'], mode='predict')
    if task_of(network) == 'depth':
        maps = found.pred_depth_map.data.reshape(1, 1, *found.pred_depth_map.data.shape[-2:])
        answer = maps[0, 0]
    else:
        maps, answer = found.seg_logits.data[None], found.pred_sem_seg.data[0]
        if maps.shape[1] == 1:  # mmseg has taken the sigmoid already
            maps = maps.double().logit(eps=1e-12)
    return (maps.flip(-1), answer.flip(-1)) if mirrored else (maps, answer)


# --- images --------------------------------------------------------------------------------------------------------


def _kind(step: Mapping[str, Any]) -> str:
    kind = step.get('type', '')
    return kind.rsplit('.', 1)[-1] if isinstance(kind, str) else kind.__name__


def pipeline_of_test(cfg: Config, *, labels: bool) -> list[Any]:
    """The steps that load an image for a test.

    Args:
        cfg: the teacher's.
        labels: keep the steps that load labels. Without, an embedded scene is loaded from its file as well.

    Returns:
        Configs of the steps.

    Raises:
        ConfigError: the config has no pipeline of its test or validation.
    """
    for name in ('test_dataloader', 'val_dataloader'):
        dataset = (cfg.get(name) or {}).get('dataset') or {}
        while 'pipeline' not in dataset and 'dataset' in dataset:
            dataset = dataset['dataset']
        if dataset.get('pipeline'):
            steps = copy.deepcopy(list(dataset['pipeline']))
            break
    else:
        raise ConfigError(
            f'{OWNER}: `config` must define the pipeline of its test (`test_dataloader.dataset.pipeline`) or '
            f'validation, got {sorted(key for key in cfg if key.endswith("_dataloader"))}.'
        )
    if labels:
        return steps
    steps = [step for step in steps if not (_kind(step).startswith('Load') and 'Annotation' in _kind(step))]
    return [dict(type='LoadImageFromFile') if _kind(step) == 'LoadScene' else step for step in steps]


def labelled_dataset(cfg: Config, name: str) -> Any:
    """A dataset of the config, with the pipeline of the test."""
    loader = cfg.get(f'{name}_dataloader')
    if loader is None:
        raise ConfigError(f'{OWNER}: `config` must define `{name}_dataloader` for --dataset {name}, got none.')
    dataset = copy.deepcopy(loader['dataset'])
    while 'dataset' in dataset:  # repeated, paired or balanced: each image once
        dataset = dataset['dataset']
    pipeline = pipeline_of_test(cfg, labels=True)
    for one in dataset.get('datasets', [dataset]):
        one.update(pipeline=copy.deepcopy(pipeline), test_mode=True)
    return DATASETS.build(dataset)


def images_of(cfg: Config, args: argparse.Namespace) -> tuple[Any, list[tuple[str, int]]]:
    """The images to be judged.

    Args:
        cfg: the teacher's.
        args: the command line.

    Returns:
        A dataset, and of each of its images below the folder the path there and the index.

    Raises:
        ConfigError: there is none, or a path that a list cannot hold.
    """
    if args.dataset is None:
        config = dict(type='mmstructkd.ImageFolderDataset', data_root=str(args.images), test_mode=True)
        dataset = DATASETS.build(dict(config, pipeline=pipeline_of_test(cfg, labels=False)))
    else:
        dataset = labelled_dataset(cfg, args.dataset)
    root = os.path.abspath(args.images)
    labels = os.path.abspath(label_folder(args))  # of a run before, where the list lies among the images
    found: dict[str, int] = {}
    elsewhere = ''
    for index in range(len(dataset)):
        path = os.path.abspath(dataset.get_data_info(index).get('img_path', ''))
        if os.path.commonpath([root, path]) != root or not os.path.isfile(path):
            elsewhere = elsewhere or path
            continue
        if os.path.commonpath([labels, path]) == labels and labels != root:
            continue
        name = os.path.relpath(path, root)
        if name.splitlines() != [name] or name.strip() != name:
            raise ConfigError(
                f'{OWNER}: `images` must have names that a list can hold, got {name!r}. Rename it: no line breaks, no '
                'blanks at either end.'
            )
        found.setdefault(name, index)
    if not found:
        raise ConfigError(
            f'{OWNER}: `images` must be the folder of the images of `{args.dataset}_dataloader`, got '
            f'{str(args.images)!r}. No file below it is one of them; the first of that dataset is {elsewhere!r}.'
        )
    return dataset, list(found.items())


# --- errors --------------------------------------------------------------------------------------------------------


def _label(sample: Any, name: str, device: Any) -> Tensor:
    """The labels of a sample, (1, H, W)."""
    if not hasattr(sample, name):
        raise ConfigError(
            f'{OWNER}: the test pipeline of `config` must load `{name}` for --by loss, got none. Add the step '
            'LoadAnnotations, or for depth LoadDepthAnnotation.'
        )
    data = torch.as_tensor(getattr(sample, name).data).to(device)
    return data.reshape(1, *data.shape[-2:])


def error_of(
    teacher: nn.Module, sample: Mapping[str, Any], maps: Tensor, *, by: str, student: nn.Module | None = None
) -> float:
    """The error of one image; see the top of this file.

    Args:
        teacher: the network.
        sample: see :func:`predict`.
        maps: what the teacher says, (1, C, H, W).
        by: ``'loss'``, ``'confidence'`` or ``'flip'``.
        student: multiplies its confidence with the teacher's.

    Returns:
        At least 0; NaN for an image without a labelled pixel.
    """
    depth = task_of(teacher) == 'depth'
    if by == 'flip':
        other, _ = predict(teacher, sample, mirrored=True)
        apart = value_disagreement(maps, other)[:, 0] if depth else score_disagreement(maps, other)
        return image_mean(apart).item()
    if by == 'confidence':
        if student is None:
            return 1 - image_mean(score_confidence(maps)).item()
        theirs, _ = predict(student, sample)
        return 1 - image_mean(joint_confidence(theirs, maps)).item()
    if depth:
        labels = _label(sample['data_samples'], 'gt_depth_map', maps.device).to(maps.dtype)
        labels = resize_labels(labels, (int(maps.shape[-2]), int(maps.shape[-1])))
        reads = labels.isfinite() & (labels > 0)
        return image_mean(value_disagreement(maps[:, 0], torch.where(reads, labels, 0)), valid=reads).item()
    labels = _label(sample['data_samples'], 'gt_sem_seg', maps.device).long()
    losses, counts = label_losses(maps, labels, ignore_index=getattr(head_of(teacher), 'ignore_index', 255))
    return image_mean(losses, valid=counts).item()


@torch.no_grad()
def judge(
    teacher: nn.Module, dataset: Any, images: Sequence[tuple[str, int]], *, by: str, student: nn.Module | None = None
) -> list[Judged]:
    """Judge all images. Those that cannot be loaded are printed and left out.

    Args:
        teacher: the network.
        dataset: loads them.
        images: path and index of each.
        by: see :func:`error_of`.
        student: see :func:`error_of`.

    Returns:
        One for each image that can be loaded.

    Raises:
        ConfigError: none can be loaded.
    """
    found: list[Judged] = []
    broken: list[tuple[str, Exception]] = []
    for path, index in images:
        try:
            sample = dataset[index]
        except Exception as err:
            # A folder from the web has files that are no images, and each reader raises what it likes.
            broken.append((path, err))
            print(f'{path} cannot be loaded ({type(err).__name__}: {err})')
            continue
        maps, answer = predict(teacher, sample)
        group = 0 if task_of(teacher) == 'depth' else int(answer.long().flatten().bincount().argmax())
        found.append(Judged(path, index, error_of(teacher, sample, maps, by=by, student=student), group))
    if broken and not found:
        first, reason = broken[0]
        raise ConfigError(
            f'{OWNER}: `images` must hold images that the pipeline can load, got none; the first is {first!r} '
            f'({type(reason).__name__}: {reason}).'
        ) from reason
    return found


# --- the whole -----------------------------------------------------------------------------------------------------


def choose(judged: Sequence[Judged], quantile: float, task: str) -> list[Judged]:
    """Those with an error below the quantile, of their class or for depth of all."""
    errors = torch.tensor([one.error for one in judged], dtype=torch.float64)
    groups = torch.tensor([one.group for one in judged]) if task == 'seg' else None
    kept = filter_by_quantile(errors, quantile=quantile, classes=groups)
    return [one for one, keep in zip(judged, kept.tolist(), strict=True) if keep]


@torch.no_grad()
def write_labels(teacher: nn.Module, dataset: Any, kept: Sequence[Judged], folder: Path) -> None:
    """Write what the teacher says of images: classes as a PNG of 8 bits, metres as an NPY of float32.

    ``a/b.jpg`` has its labels in ``a/b.jpg.png`` or ``a/b.jpg.npy``, so that ``a/b.png`` has others.

    Args:
        teacher: the network.
        dataset: loads the images.
        kept: the images.
        folder: of the files.

    Raises:
        ConfigError: a file cannot be written.
    """
    task = task_of(teacher)
    for one in kept:
        _, answer = predict(teacher, dataset[one.place])
        file = folder / f'{one.path}{SUFFIXES[task]}'
        file.parent.mkdir(parents=True, exist_ok=True)
        if task == 'depth':
            np.save(file, answer.float().cpu().numpy())
        elif not cv2.imwrite(str(file), answer.to(torch.uint8).cpu().numpy()):
            raise ConfigError(f'{OWNER}: `--write-labels` must be a folder that can be written, got {str(folder)!r}.')


def report(judged: Sequence[Judged], kept: Sequence[Judged], by: str, task: str) -> None:
    """Print how many images of each class are kept."""
    print(f'| {"class" if task == "seg" else "images of"} | images | kept | mean {by} | largest kept |')
    print('| --- | --- | --- | --- | --- |')
    for group in sorted({one.group for one in judged}):
        errors = [one.error for one in judged if one.group == group]
        chosen = [one.error for one in kept if one.group == group]
        known = [error for error in errors if not np.isnan(error)]
        mean = f'{np.mean(known):.4f}' if known else '-'
        largest = f'{max(chosen):.4f}' if chosen else '-'
        print(f'| {group if task == "seg" else "all"} | {len(errors)} | {len(chosen)} | {mean} | {largest} |')


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Judge, choose and write; return the paths of the list."""
    args = parse_args(argv)
    cfg = read_config(args.config, args.cfg_options, OWNER)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    teacher = load_network(cfg, args.checkpoint, args)
    task = task_of(teacher)
    by = args.by or ('loss' if args.dataset else 'flip' if task == 'depth' else 'confidence')
    if task == 'depth' and by == 'confidence':
        raise ConfigError(
            f'{OWNER}: `--by` must be flip or loss for depth, got confidence. Metres have no probability.'
        )
    student = None
    if args.student is not None:
        if by != 'confidence':
            raise ConfigError(f'{OWNER}: `--student` must come with --by confidence, got {by}. Leave one of them out.')
        student = load_network(read_config(args.student[0], None, OWNER), args.student[1], args)
        if task_of(student) != task:
            raise ConfigError(f'{OWNER}: `--student` must be a segmentor, got {type(student).__name__}.')
    classes = getattr(head_of(teacher), 'num_classes', 0)
    if args.write_labels is not None and task == 'seg' and classes > MOST_CLASSES:
        raise ConfigError(
            f'{OWNER}: `--write-labels` must have at most {MOST_CLASSES} classes, got {classes}: mmseg reads labels of '
            '8 bits. Leave it out.'
        )
    dataset, images = images_of(cfg, args)
    judged = judge(teacher, dataset, images, by=by, student=student)
    kept = choose(judged, args.quantile, task)
    report(judged, kept, by, task)
    if not kept:
        raise ConfigError(
            f'{OWNER}: `--quantile` must leave an image, got {args.quantile} of {len(judged)}. An image at the '
            'quantile is not kept: of one image, or of equal errors, none is.'
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(''.join(f'{one.path}\n' for one in kept))
    print(f'\n{args.out}: {len(kept)} of {len(images)} images')
    if args.write_labels is not None:
        folder = label_folder(args)
        write_labels(teacher, dataset, kept, folder)
        print(f'{folder}: their labels')
    return [one.path for one in kept]


if __name__ == '__main__':
    with one_line_errors():
        main()
