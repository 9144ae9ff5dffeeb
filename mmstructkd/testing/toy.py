"""A segmentor that trains in milliseconds, and the config of a run on the embedded scenes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor

from mmstructkd.datasets.scenes import CLASSES

__all__ = ['toy_batch', 'toy_config', 'toy_distiller', 'toy_segmentor', 'toy_terms']

SIZE = (48, 64)


def toy_segmentor(width: int = 4, num_classes: int = len(CLASSES), **changes: Any) -> ConfigDict:
    """Config of an FCN on a ResNet-18 of a few channels, with an auxiliary head.

    Args:
        width: channels of the first stage.
        num_classes: number of classes.
        **changes: override keys of the model.

    Returns:
        Config of an mmseg ``EncoderDecoder``.
    """
    norm = dict(type='BN', requires_grad=True)
    head = dict(
        type='FCNHead',
        num_convs=1,
        concat_input=False,
        num_classes=num_classes,
        norm_cfg=norm,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    )
    model = dict(
        type='EncoderDecoder',
        _scope_='mmseg',
        data_preprocessor=dict(
            type='SegDataPreProcessor',
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True,
            size=SIZE,
        ),
        backbone=dict(
            type='ResNetV1c',
            depth=18,
            stem_channels=width,
            base_channels=width,
            out_indices=(0, 1, 2, 3),
            strides=(1, 2, 1, 1),
            dilations=(1, 1, 2, 4),
            norm_cfg=norm,
            norm_eval=False,
            contract_dilation=True,
        ),
        decode_head=dict(head, in_channels=8 * width, in_index=3, channels=2 * width, dropout_ratio=0.1),
        auxiliary_head=dict(head, in_channels=4 * width, in_index=2, channels=width, dropout_ratio=0.1),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )
    model.update(copy.deepcopy(changes))
    return ConfigDict(model)


def toy_terms() -> dict[str, dict]:
    """One term of each kind: logits, affinities, a connector, a critic."""
    return dict(
        pixel=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss')),
        pairwise=dict(tap='decode_head.convs', loss=dict(type='mmstructkd.PairwiseAffinityLoss', loss_weight=10.0)),
        feature=dict(tap='backbone[3]', loss=dict(type='mmstructkd.ChannelwiseKLLoss')),
        holistic=dict(
            tap='decode_head.conv_seg',
            loss=dict(type='mmstructkd.HolisticLoss', critic=dict(base_channels=4), loss_weight=0.1),
        ),
    )


def toy_distiller(**changes: Any) -> ConfigDict:
    """Config of a distiller with a random teacher of twice the width.

    Args:
        **changes: override keys of the model.

    Returns:
        Config of a :class:`StructuredDistiller` with all :func:`toy_terms`.
    """
    model = dict(
        type='mmstructkd.StructuredDistiller',
        student=toy_segmentor(4),
        teacher=dict(config=toy_segmentor(8), allow_random=True),
        terms=toy_terms(),
    )
    model.update(copy.deepcopy(changes))
    return ConfigDict(model)


def toy_batch(
    batch: int = 2, size: tuple[int, int] = SIZE, num_classes: int = len(CLASSES), seed: int = 0
) -> dict[str, Any]:
    """A preprocessed batch of noise with random labels, some of them ignored.

    Args:
        batch: number of images.
        size: (H, W).
        num_classes: number of classes.
        seed: of the noise.

    Returns:
        ``inputs`` and ``data_samples``, as a data preprocessor returns them.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(batch):
        labels = torch.randint(0, num_classes, (1, *size), generator=generator)
        labels[:, :2] = 255
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    inputs: Tensor = torch.randn(batch, 3, *size, generator=generator)
    return dict(inputs=inputs, data_samples=samples)


def _scenes(task: str) -> tuple[str, list[dict], list[dict], dict]:
    """Dataset, pipelines for training and test, and metric of a task on the embedded scenes."""
    load, flip = dict(type='mmstructkd.LoadScene'), dict(type='RandomFlip', prob=0.5)
    if task == 'det':
        load = [load, dict(type='LoadAnnotations', with_bbox=True)]
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances')
        metric = dict(type='CocoMetric', metric='bbox')
        pack = dict(type='PackDetInputs')
        return 'mmstructkd.SceneDetDataset', [*load, flip, pack], [*load, dict(pack, meta_keys=keys)], metric
    pack = dict(type='PackSegInputs')
    if task == 'depth':
        load = [load, dict(type='mmstructkd.LoadSceneAnnotations', with_seg=False, with_depth=True)]
        metric = dict(type='DepthMetric', min_depth_eval=0.1, max_depth_eval=24.5)
        return 'mmstructkd.SceneDepthDataset', [*load, flip, pack], [*load, pack], metric
    load = [load, dict(type='mmstructkd.LoadSceneAnnotations')]
    metric = dict(type='IoUMetric', iou_metrics=['mIoU'])
    train = [*load, flip, dict(type='PhotoMetricDistortion'), pack]
    return 'mmstructkd.SceneSegDataset', train, [*load, pack], metric


def toy_config(model: dict, work_dir: Any, max_iters: int = 4, task: str = 'seg', **changes: Any) -> Config:
    """Config of a run of ``model`` on the embedded scenes.

    Args:
        model: config of a network or distiller.
        work_dir: folder of the run.
        max_iters: iterations; a checkpoint every second one, no validation.
        task: ``'seg'``, ``'depth'`` or ``'det'``.
        **changes: override top-level keys.

    Returns:
        The config, for ``Runner.from_cfg``.
    """
    kind, train_pipeline, test_pipeline, metric = _scenes(task)
    dataset = dict(type=kind, num_scenes=8, size=SIZE)
    cfg = dict(
        default_scope='mmdet' if task == 'det' else 'mmseg',
        custom_imports=dict(imports=['mmstructkd'], allow_failed_imports=False),
        model=copy.deepcopy(model),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='InfiniteSampler', shuffle=True),
            dataset=dict(dataset, split='train', pipeline=train_pipeline),
        ),
        val_dataloader=dict(
            batch_size=1,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(dataset, split='val', test_mode=True, pipeline=test_pipeline),
        ),
        val_evaluator=metric,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=1000 * max_iters),
        val_cfg=dict(type='ValLoop'),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4)),
        param_scheduler=[dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=max_iters, by_epoch=False)],
        default_hooks=dict(
            timer=dict(type='IterTimerHook'),
            logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
            param_scheduler=dict(type='ParamSchedulerHook'),
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
            sampler_seed=dict(type='DistSamplerSeedHook'),
        ),
        env_cfg=dict(mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0), dist_cfg=dict(backend='gloo')),
        randomness=dict(seed=0),
        log_processor=dict(by_epoch=False),
        log_level='WARNING',
        experiment_name='toy',
    )
    cfg.update(copy.deepcopy(changes))
    return Config(cfg)
