# Residual KD: the trained student keeps its backbone; an assistant beside it learns what that leaves over of the teacher.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
load_from = 'work_dirs/base/iter_300.pth'  # the student alone: its backbone, and its head to begin with
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=dict(_base_.model, backbone=dict(
        type='mmstructkd.ResidualBackbone',
        base=_base_.model.backbone,
        assistant=dict(_base_.model.backbone, base_channels=4, stem_channels=4))),
    teacher=dict(
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    terms=dict(residual=dict(tap='backbone[*]', match='order', loss=dict(type='mmstructkd.FeatureMSELoss'))))
