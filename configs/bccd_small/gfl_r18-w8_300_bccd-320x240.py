# The student of the BCCD study: the teacher's detector at a quarter of its width, from scratch.
_base_ = './gfl_r18-w32_600_bccd-320x240.py'
model = dict(
    backbone=dict(base_channels=8, stem_channels=8),
    neck=dict(in_channels=[16, 32, 64], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16))
train_cfg = dict(max_iters=300)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=50, by_epoch=False),
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=50, end=300, by_epoch=False),
]
