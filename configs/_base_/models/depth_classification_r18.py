# Depth as bins on ResNet-18, otherwise as depth_regression_r18.py. Tap `decode_head.conv_depth` for the bins' scores
# and `decode_head.to_depth` for the depth map.
_base_ = './segmentor_r18.py'
model = dict(
    type='DepthEstimator',
    # what pads a depth map, too: no reading
    data_preprocessor=dict(seg_pad_val=0),
    decode_head=dict(
        type='mmstructkd.DepthClassificationHead',
        in_channels=[32, 64, 128, 256],
        in_index=[0, 1, 2, 3],
        channels=32,
        num_convs=2,
        num_bins=64,
        min_depth=0.5,
        max_depth=25.0,
        norm_cfg=_base_.norm_cfg,
        align_corners=False,
        loss_bins=dict(type='mmstructkd.DepthBinLoss', sharpness=0.2, loss_weight=1.0)))
