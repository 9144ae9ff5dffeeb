# Metric depth on ResNet-18, strides 4 to 32, from scratch, half as wide as usual: all four features, resized to
# stride 4 and concatenated. Limits in metres, those of the embedded scenes. Another width: `base_channels` and
# `stem_channels` of the backbone, and `in_channels` of the head. Tap `decode_head.to_depth` for the depth map.
_base_ = './segmentor_r18.py'
model = dict(
    type='DepthEstimator',
    # what pads a depth map, too: no reading
    data_preprocessor=dict(seg_pad_val=0),
    decode_head=dict(
        type='mmstructkd.DepthRegressionHead',
        in_channels=[32, 64, 128, 256],
        in_index=[0, 1, 2, 3],
        channels=32,
        num_convs=2,
        min_depth=0.5,
        max_depth=25.0,
        mapping='sigmoid',
        norm_cfg=_base_.norm_cfg,
        align_corners=False,
        loss_decode=[
            dict(type='mmstructkd.DepthSILogLoss', loss_weight=1.0),
            dict(type='mmstructkd.DepthL1Loss', loss_weight=0.1),
        ]))
