# StructKD on CamVid: the pixel-wise, pair-wise and holistic terms together.
# The teacher comes from pspnet_r18-d8-w32_2400_camvid-180x240.py; give its checkpoint with
# --cfg-options model.teacher.checkpoint=PATH if it lies elsewhere.
_base_ = ['./fcn_r18-d8-w16_600_camvid-180x240.py']
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/pspnet_r18-d8-w32_2400_camvid-180x240.py',
        checkpoint='work_dirs/camvid_small/teacher/iter_2400.pth'),
    terms=dict(
        pixel=dict(
            tap='decode_head.conv_seg',
            loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=10.0)),
        pairwise=dict(
            tap=dict(student='decode_head.convs', teacher='decode_head.bottleneck'),
            loss=dict(type='mmstructkd.PairwiseAffinityLoss', loss_weight=10.0)),
        # the critic is half as wide as the published one: the maps are 23x30
        holistic=dict(
            tap='decode_head.conv_seg',
            loss=dict(type='mmstructkd.HolisticLoss', critic=dict(base_channels=32)))))
