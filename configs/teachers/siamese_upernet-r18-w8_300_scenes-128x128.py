# Siamese self-distillation: the student on the mirrored image, without graph; logits, and a feature behind a predictor.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(type='mmstructkd.ViewTeacher', flip=True),
    terms=dict(
        kd=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=0.5)),
        feature=dict(
            tap='backbone[3]', connector=dict(type='mmstructkd.DeepProjectorConnector'),
            loss=dict(type='mmstructkd.StandardizedMSELoss'))))
