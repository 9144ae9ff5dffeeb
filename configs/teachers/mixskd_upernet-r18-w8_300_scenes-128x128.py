# MixSKD: what the student makes of a blend learns from the blend of what it made of both images.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(type='mmstructkd.BlendTeacher', stream='mixed'),
    streams=dict(mixed=dict(type='mmstructkd.MixedStream', alpha=0.4, norm='update')),
    terms=dict(
        logits=dict(
            on='mixed', tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', temperature=3.0)),
        maps=dict(on='mixed', tap='backbone[*]', loss=dict(type='mmstructkd.FeatureMSELoss'))))
