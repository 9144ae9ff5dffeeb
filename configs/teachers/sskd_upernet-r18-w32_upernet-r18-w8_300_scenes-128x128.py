# SSKD: class scores, upright and turned by 180 degrees, and how like each turned cell is to the upright ones.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    streams=dict(views=dict(type='mmstructkd.TurnedStream', turns=('none', 'half'))),
    terms=dict(
        kd=dict(
            on='views', tap='decode_head.conv_seg',
            loss=dict(type='mmstructkd.PixelwiseKLLoss', temperature=4.0, loss_weight=2.7)),
        similarity=dict(on='views', tap='backbone[3]', loss=dict(type='mmstructkd.CrossViewSimilarityLoss'))))
