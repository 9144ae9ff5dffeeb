# PKD on BCCD, on each level of the pyramid; at a third of its code's weight (30 on three levels).
_base_ = './gfl_r18-w8_600_bccd-320x240.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/gfl_r18-w32_600_bccd-320x240.py',
        checkpoint='work_dirs/bccd_small/teacher/iter_600.pth'),
    terms=dict(
        feature=dict(
            tap='neck[*]', loss=dict(type='mmstructkd.StandardizedMSELoss', preset='pkd', loss_weight=10.0))))
