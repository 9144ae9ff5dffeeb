# The teacher of the quickstart for depth: metric depth on a ResNet-18 of half the width, from scratch.
_base_ = [
    '../_base_/models/depth_regression_r18.py',
    '../_base_/datasets/scenes_depth.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/cpu_adamw.py',
]
model = dict(data_preprocessor=dict(size=(128, 128)))
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_iters=500, val_interval=500)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=50, by_epoch=False),
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=50, end=500, by_epoch=False),
]
