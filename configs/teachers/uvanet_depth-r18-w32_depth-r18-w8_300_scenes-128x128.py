# UVA-Net's form for depth: the student trains, and is tested, at half the resolution that its teacher sees.
_base_ = '../scenes/depth_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    student_scale=0.5,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/depth_r18-w32_500_scenes-128x128.py',
        checkpoint='work_dirs/depth_r18-w32_500_scenes-128x128/iter_500.pth'),
    terms=dict(depth=dict(
        tap='decode_head.to_depth', loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1'))))
val_dataloader = dict(dataset=dict(pipeline=[
    _base_.test_pipeline[0], dict(type='Resize', scale_factor=0.5, keep_ratio=True), *_base_.test_pipeline[1:]]))
test_dataloader = val_dataloader
