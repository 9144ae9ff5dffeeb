# The student of the quickstart with StructKD's pixel-wise and pair-wise terms; docs/results/scenes.md compares.
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
        pixel=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=10.0)),
        pairwise=dict(
            tap='decode_head.fpn_bottleneck', loss=dict(type='mmstructkd.PairwiseAffinityLoss', loss_weight=10.0))))
