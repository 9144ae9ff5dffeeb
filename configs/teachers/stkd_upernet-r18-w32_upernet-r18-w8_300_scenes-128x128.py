# STKD: blends of two images, on which the teacher is the only one to ask.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    streams=dict(mixed=dict(type='mmstructkd.MixedStream', alpha=1.0)),
    terms=dict(kd=dict(
        on=['labelled', 'mixed'], tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.PixelwiseKLLoss', temperature=4.0, loss_weight=1.0))))
