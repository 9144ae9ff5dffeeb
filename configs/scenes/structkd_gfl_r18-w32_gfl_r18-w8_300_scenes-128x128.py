# The distilled student of the quickstart for detection: distributions of box edges, and affinities on the pyramid's levels.
# The quickstart trains the teacher; elsewhere: --cfg-options model.teacher.checkpoint=PATH
_base_ = './gfl_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/gfl_r18-w32_500_scenes-128x128.py',
        checkpoint='work_dirs/quickstart_detection/teacher/iter_500.pth'),
    terms=dict(
        edges=dict(tap='bbox_head.gfl_reg', loss=dict(type='mmstructkd.LocalizationKLLoss', loss_weight=0.25)),
        pairwise=dict(
            tap='neck[*]',
            loss=dict(type='mmstructkd.PairwiseAffinityLoss', max_side=32, loss_weight=1.0))))
