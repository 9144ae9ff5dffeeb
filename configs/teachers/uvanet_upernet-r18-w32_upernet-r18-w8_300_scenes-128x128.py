# UVA-Net's form for segmentation: the student trains, and is tested, at half the resolution that its teacher sees.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    student_scale=0.5,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    terms=dict(kd=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss'))))
val_dataloader = dict(dataset=dict(pipeline=[
    _base_.test_pipeline[0], dict(type='Resize', scale_factor=0.5, keep_ratio=True), *_base_.test_pipeline[1:]]))
test_dataloader = val_dataloader
