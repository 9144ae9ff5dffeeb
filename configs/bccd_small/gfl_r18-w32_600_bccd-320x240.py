# The teacher of the BCCD study: GFL on a ResNet-18 of half the width, from scratch.
_base_ = [
    '../_base_/models/gfl_r18.py',
    '../_base_/datasets/bccd_320x240.py',
    '../_base_/default_runtime_det.py',
    '../_base_/schedules/cpu_adamw.py',
]
model = dict(bbox_head=dict(num_classes=3))
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=10.0))
train_cfg = dict(max_iters=600)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=50, by_epoch=False),
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=50, end=600, by_epoch=False),
]
