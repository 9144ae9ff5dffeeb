# Depth in 150 bins on MobileNetV2, pyramid and head half as wide as the teacher's.
_base_ = ['./depth-fpn_r101_4xb4-40k_nyu-480x480.py']
model = dict(
    pretrained='mmcls://mobilenet_v2',
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(1, 2, 4, 6),
        norm_cfg=dict(type='SyncBN', requires_grad=True)),
    neck=dict(in_channels=[24, 32, 96, 320], out_channels=128),
    decode_head=dict(in_channels=128, channels=64))
