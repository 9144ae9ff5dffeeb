# The teacher of the quickstart: UPerNet on a ResNet-18 of half the width, stride 4, from scratch.
_base_ = [
    '../_base_/models/segmentor_r18.py',
    '../_base_/datasets/scenes_seg.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/cpu_adamw.py',
]
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    decode_head=dict(
        type='UPerHead',
        in_channels=[32, 64, 128, 256],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=32,
        dropout_ratio=0.1,
        num_classes=10,
        norm_cfg=_base_.norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)))
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_iters=800, val_interval=800)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=50, by_epoch=False),
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=50, end=800, by_epoch=False),
]
