# HSAKD: what the teacher's auxiliary heads say of class and turn together, and its class scores, upright and turned.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/turned_upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/turned/iter_800.pth'),
    streams=dict(turned=dict(type='mmstructkd.TurnedStream', turns=('half', 'flip', 'flip_half'))),
    terms=dict(
        joint=dict(
            on=['labelled', 'turned'], connector=dict(type='mmstructkd.ConvConnector'),
            tap=dict(
                student=['backbone[2]', 'backbone[3]'],
                teacher=['auxiliary_head.0.conv_seg', 'auxiliary_head.1.conv_seg']),
            loss=dict(type='mmstructkd.PixelwiseKLLoss', temperature=3.0)),
        kd=dict(
            on=['labelled', 'turned'], tap='decode_head.conv_seg',
            loss=dict(type='mmstructkd.PixelwiseKLLoss', temperature=3.0))))
