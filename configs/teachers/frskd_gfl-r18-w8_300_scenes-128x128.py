# FRSKD for detection: attention of the pyramid, refined; the twin has a dense head of its own.
_base_ = '../scenes/gfl_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(type='mmstructkd.SelfTeacher', features='neck[*]'),
    terms=dict(
        levels=dict(
            tap='neck[*]', match='order',
            loss=dict(type='mmstructkd.AttentionTransferLoss', loss_weight=150.0))))
