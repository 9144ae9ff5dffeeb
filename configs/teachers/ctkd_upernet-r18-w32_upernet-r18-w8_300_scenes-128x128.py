# CTKD, instance-wise: a small network gives each pixel a temperature, trained against the student.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    terms=dict(kd=dict(
        tap='decode_head.conv_seg',
        loss=dict(
            type='mmstructkd.PixelwiseKLLoss',
            temperature=dict(type='mmstructkd.InstanceTemperature', per='position', hidden=64)))))
