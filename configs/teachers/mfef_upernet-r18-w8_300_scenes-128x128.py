# Near MFEF: refined features of its own and a peer; the authors fuse both before one head.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teachers=dict(
        own=dict(type='mmstructkd.SelfTeacher', features='backbone[*]'),
        peer=dict(
            type='mmstructkd.PeerTeacher',
            config='{{ fileDirname }}/../scenes/upernet_r18-w8_300_scenes-128x128.py')),
    terms=dict(
        own=dict(
            tap=dict(student='decode_head.conv_seg', teacher='own.decode_head.conv_seg'),
            loss=dict(type='mmstructkd.PixelwiseKLLoss')),
        peer=dict(
            tap=dict(student='decode_head.conv_seg', teacher='peer.decode_head.conv_seg'),
            loss=dict(type='mmstructkd.PixelwiseKLLoss'))))
