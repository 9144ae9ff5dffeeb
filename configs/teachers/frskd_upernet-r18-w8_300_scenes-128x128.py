# FRSKD: the student's own features, refined by a twin that leaves at the end; its terms begin after two thirds.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(type='mmstructkd.SelfTeacher', features='backbone[*]'),
    terms=dict(
        logits=dict(
            tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss'),
            schedule=dict(type='ramp_up', begin=200)),
        levels=dict(  # published: 50 for each of the four levels, which it adds up
            tap=dict(student='backbone[*]', teacher='neck[*]'), match='order',
            loss=dict(type='mmstructkd.AttentionTransferLoss', loss_weight=200.0),
            schedule=dict(type='ramp_up', begin=200))))
