# Depth in 150 bins on ResNet-101, for NYU Depth V2: the teacher.
_base_ = [
    '../_base_/models/depth_fpn_r101.py', '../_base_/datasets/nyu_480x480.py',
    'mmseg::_base_/default_runtime.py', '../_base_/schedules/depth_adamw_40k.py'
]
custom_imports = dict(imports=['mmstructkd'])
data_preprocessor = dict(size=(480, 480))
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(
        type='mmstructkd.DepthClassificationHead',
        num_bins=150,
        min_depth=0.25,
        max_depth=10.0))
