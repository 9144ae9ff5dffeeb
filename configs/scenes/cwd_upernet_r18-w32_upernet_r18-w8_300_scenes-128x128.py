# The distilled student of the quickstart. A config of one's own looks the same: a student's config, a teacher, terms.
# The quickstart trains the teacher; elsewhere: --cfg-options model.teacher.checkpoint=PATH
_base_ = './upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    terms=dict(
        channel=dict(
            tap='decode_head.conv_seg',
            loss=dict(type='mmstructkd.ChannelwiseKLLoss', temperature=1.0, loss_weight=5.0))))
