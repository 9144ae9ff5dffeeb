# Deep mutual learning for depth: both compare their metres.
_base_ = '../scenes/depth_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        type='mmstructkd.PeerTeacher',
        config='{{ fileDirname }}/../scenes/depth_r18-w8_300_scenes-128x128.py',
        terms=dict(back=dict(
            tap='decode_head.to_depth', loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1', loss_weight=0.2)))),
    terms=dict(mutual=dict(
        tap='decode_head.to_depth', loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1', loss_weight=0.2))))
