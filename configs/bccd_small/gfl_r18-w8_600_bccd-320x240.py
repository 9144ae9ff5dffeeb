# The student of the BCCD study: the teacher's detector at a quarter of its width, from scratch.
_base_ = './gfl_r18-w32_600_bccd-320x240.py'
model = dict(
    backbone=dict(base_channels=8, stem_channels=8),
    neck=dict(in_channels=[16, 32, 64], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16))
