# The teacher of the kitchen study: metric depth on a ResNet-18 of half the width, from scratch.
_base_ = [
    '../_base_/models/depth_regression_r18.py',
    '../_base_/datasets/kitchen_160x224.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/cpu_adamw.py',
]
model = dict(
    data_preprocessor=dict(size=(160, 224)),
    decode_head=dict(min_depth=0.1, max_depth=10.0))
train_cfg = dict(max_iters=600)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=50, by_epoch=False),
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=50, end=600, by_epoch=False),
]
