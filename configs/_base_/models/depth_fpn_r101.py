# A depth estimator on ResNet-101 with a pyramid; the head sees its finest level, stride 4. A config adds what the head
# makes of it. Tap `decode_head.convs` for the last feature and `decode_head.to_depth` for the depth map.
_base_ = 'mmseg::_base_/models/fpn_r50.py'
data_preprocessor = dict(
    # what pads a depth map, too: no reading
    seg_pad_val=0)
model = dict(
    type='DepthEstimator',
    data_preprocessor=data_preprocessor,
    pretrained='open-mmlab://resnet101_v1c',
    backbone=dict(depth=101),
    decode_head=dict(
        _delete_=True,
        in_channels=256,
        in_index=0,
        channels=128,
        num_convs=2,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False))
