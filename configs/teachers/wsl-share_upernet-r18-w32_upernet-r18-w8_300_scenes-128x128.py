# Weighted soft labels, and how often the teacher is less sure of the label than the student: logged, not trained on.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    terms=dict(wsl=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.WeightedSoftLabelLoss'))))
custom_hooks = [dict(type='mmstructkd.RegularizationShareHook', interval=50)]
