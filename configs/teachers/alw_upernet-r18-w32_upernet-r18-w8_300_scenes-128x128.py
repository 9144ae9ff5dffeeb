# AICSD's adaptive weighting: the pixel term fades while inter-class similarity and the task come in.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    task_schedule=dict(type='linear', start_factor=0.0, end_factor=1.0),
    terms=dict(
        pixel=dict(
            tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=10.0),
            schedule=dict(type='linear', start_factor=1.0, end_factor=0.0)),
        icsd=dict(
            tap='decode_head.conv_seg', loss=dict(type='mmstructkd.InterclassSimilarityLoss'),
            schedule=dict(type='linear'))))
