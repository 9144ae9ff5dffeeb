# The teacher of the CamVid study: PSPNet-R18 at stride 8, half the width, from scratch.
_base_ = [
    '../_base_/models/segmentor_r18-d8.py',
    '../_base_/datasets/camvid_180x240.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/cpu_adamw.py',
]
model = dict(
    data_preprocessor=dict(size=(180, 240)),
    decode_head=dict(
        type='PSPHead',
        in_channels=256,
        in_index=3,
        channels=128,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=_base_.norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)))
train_cfg = dict(max_iters=2400)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=50, by_epoch=False),
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=50, end=2400, by_epoch=False),
]
