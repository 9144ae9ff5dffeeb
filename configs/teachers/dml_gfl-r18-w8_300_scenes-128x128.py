# Deep mutual learning for detection: the pyramids of two detectors, standardised.
_base_ = '../scenes/gfl_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        type='mmstructkd.PeerTeacher',
        config='{{ fileDirname }}/../scenes/gfl_r18-w8_300_scenes-128x128.py',
        terms=dict(back=dict(tap='neck[*]', loss=dict(type='mmstructkd.StandardizedMSELoss', preset='pkd')))),
    terms=dict(mutual=dict(tap='neck[*]', loss=dict(type='mmstructkd.StandardizedMSELoss', preset='pkd'))))
