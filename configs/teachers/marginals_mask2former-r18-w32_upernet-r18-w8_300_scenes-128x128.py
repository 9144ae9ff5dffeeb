# Structural KD: the queries of a Mask2Former read as the classes of each pixel, for a student that predicts these.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/mask2former_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/mask2former/iter_800.pth'),
    terms=dict(kd=dict(
        tap=dict(student='decode_head.conv_seg', teacher='decode_head'),
        connector=dict(type='mmstructkd.QueryMarginals'),
        loss=dict(type='mmstructkd.PixelwiseKLLoss'))))
