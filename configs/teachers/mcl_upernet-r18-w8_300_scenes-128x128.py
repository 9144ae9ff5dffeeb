# MCL: two networks that learn together contrast the centres of classes of different images, each against the other's.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
contrast = dict(
    tap='decode_head.fpn_bottleneck',
    connector=dict(type='mmstructkd.DeepProjectorConnector', out_channels=128),
    loss=dict(type='mmstructkd.PrototypeContrastLoss', loss_weight=0.1))
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        type='mmstructkd.PeerTeacher', terms=dict(back=contrast),
        config='{{ fileDirname }}/../scenes/upernet_r18-w8_300_scenes-128x128.py'),
    terms=dict(contrast=contrast))
