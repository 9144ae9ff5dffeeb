# The turned views of SSKD and HSAKD, without their auxiliary heads: class scores on images turned by 180 degrees.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    streams=dict(turned=dict(type='mmstructkd.TurnedStream', turns=('half',))),
    terms=dict(turned=dict(
        on='turned', tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.PixelwiseKLLoss', temperature=4.0, loss_weight=2.7))))
