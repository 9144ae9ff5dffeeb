# PSPNet-R18 for CamVid at 360x480: the widths that mmsegmentation's R18 has for Cityscapes.
_base_ = ['./pspnet_r101-d8_1xb8-20k_camvid-360x480.py']
model = dict(
    pretrained='open-mmlab://resnet18_v1c',
    backbone=dict(depth=18),
    decode_head=dict(in_channels=512, channels=128),
    auxiliary_head=dict(in_channels=256, channels=64))
