# LAKD's local learning: the gradient ends at each gate, and the stages before it learn from the teacher's maps alone.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    gates=['backbone.layer2', 'backbone.layer3'],
    terms=dict(
        attention=dict(
            tap=['backbone[1]', 'backbone[2]', 'backbone[3]'],
            loss=dict(type='mmstructkd.AttentionTransferLoss', loss_weight=100.0)),
        maps=dict(
            tap=['backbone[1]', 'backbone[2]', 'backbone[3]'], loss=dict(type='mmstructkd.StandardizedMSELoss'))))
