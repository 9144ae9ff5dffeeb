# RCO: three checkpoints of one training, one after the other; the README says how to train them.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        type='mmstructkd.RouteTeacher',
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        route=[
            dict(checkpoint='work_dirs/route/iter_200.pth'),
            dict(checkpoint='work_dirs/route/iter_400.pth', begin=100),
            dict(checkpoint='work_dirs/route/iter_800.pth', begin=200)]),
    terms=dict(kd=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=10.0))))
