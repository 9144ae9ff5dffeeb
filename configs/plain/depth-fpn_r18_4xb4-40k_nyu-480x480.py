# Depth in 150 bins on ResNet-18, pyramid and head half as wide as the teacher's.
_base_ = ['./depth-fpn_r101_4xb4-40k_nyu-480x480.py']
model = dict(
    pretrained='open-mmlab://resnet18_v1c',
    backbone=dict(depth=18),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=128),
    decode_head=dict(in_channels=128, channels=64))
