# FRSKD for depth: attention of the refined features, and the depth that the twin reads from them.
_base_ = '../scenes/depth_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(type='mmstructkd.SelfTeacher', features='backbone[*]'),
    terms=dict(
        depth=dict(
            tap='decode_head.to_depth',
            loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1', loss_weight=0.2),
            schedule=dict(type='ramp_up', begin=200)),
        levels=dict(
            tap=dict(student='backbone[*]', teacher='neck[*]'), match='order',
            loss=dict(type='mmstructkd.AttentionTransferLoss', loss_weight=200.0),
            schedule=dict(type='ramp_up', begin=200))))
