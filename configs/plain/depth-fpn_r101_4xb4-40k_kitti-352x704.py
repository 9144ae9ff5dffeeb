# Metric depth on ResNet-101, for KITTI's Eigen split: the teacher.
_base_ = [
    '../_base_/models/depth_fpn_r101.py', '../_base_/datasets/kitti_352x704.py',
    'mmseg::_base_/default_runtime.py', '../_base_/schedules/depth_adamw_40k.py'
]
custom_imports = dict(imports=['mmstructkd'])
data_preprocessor = dict(size=(352, 704))
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(
        type='mmstructkd.DepthRegressionHead',
        min_depth=0.5,
        max_depth=80.0,
        loss_decode=[
            dict(type='mmstructkd.DepthSILogLoss', loss_weight=1.0),
            dict(type='mmstructkd.DepthL1Loss', loss_weight=0.1),
        ]))
