# The mean of two teachers, each weighed at each pixel by how sure it is there.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teachers=dict(
        big=dict(
            config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
            checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
        other=dict(
            config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
            checkpoint='work_dirs/second_teacher/iter_800.pth'),
        mean=dict(type='mmstructkd.TeacherMean', of=dict(big=0.5, other=0.5), confidence='maximum')),
    terms=dict(kd=dict(
        tap=dict(student='decode_head.conv_seg', teacher='mean.decode_head.conv_seg'),
        loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=10.0))))
