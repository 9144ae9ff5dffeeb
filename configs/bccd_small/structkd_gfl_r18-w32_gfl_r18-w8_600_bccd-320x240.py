# StructKD on BCCD: affinities on each level of the pyramid, and, position by position, the distributions of box edges.
# Not the class scores: those of GFL are the student's own judgement of its boxes, see docs/results/bccd.md.
_base_ = './gfl_r18-w8_600_bccd-320x240.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/gfl_r18-w32_600_bccd-320x240.py',
        checkpoint='work_dirs/bccd_small/teacher/iter_600.pth'),
    terms=dict(
        edges=dict(tap='bbox_head.gfl_reg', loss=dict(type='mmstructkd.LocalizationKLLoss', loss_weight=0.25)),
        pairwise=dict(
            tap='neck[*]',
            loss=dict(type='mmstructkd.PairwiseAffinityLoss', max_side=32, loss_weight=1.0))))
