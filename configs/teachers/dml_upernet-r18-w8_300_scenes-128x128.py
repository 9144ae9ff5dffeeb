# Deep mutual learning: the same network from another start; each learns the task and from the other.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        type='mmstructkd.PeerTeacher',
        config='{{ fileDirname }}/../scenes/upernet_r18-w8_300_scenes-128x128.py',
        terms=dict(back=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss')))),
    terms=dict(mutual=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss'))))
