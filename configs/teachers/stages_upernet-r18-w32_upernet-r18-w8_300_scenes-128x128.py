# FitNet's two stages in one run: hints for the backbone alone, then scores and the task for all of it.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    stages=[
        dict(end=100, terms=['hint'], task_weight=0.0, freeze=['decode_head']),
        dict(terms=['kd'])],
    terms=dict(
        hint=dict(tap='backbone[2]', loss=dict(type='mmstructkd.FeatureMSELoss')),
        kd=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=10.0))))
