# ProKT: the teacher starts from nothing beside the student and is held near it; published without a task loss for the student.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    task_weight=0.0,
    teacher=dict(
        type='mmstructkd.PeerTeacher',
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        task_weight=0.6,
        optimizer=dict(type='AdamW', lr=6e-4, weight_decay=1e-2),
        terms=dict(follow=dict(
            tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=0.4)))),
    terms=dict(kd=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss'))))
