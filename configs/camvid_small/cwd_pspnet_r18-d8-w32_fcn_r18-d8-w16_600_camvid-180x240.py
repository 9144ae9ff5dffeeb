# CWD on CamVid, on the logits, with the temperature and weight that OpenMMLab uses for segmentation.
_base_ = ['./fcn_r18-d8-w16_600_camvid-180x240.py']
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/pspnet_r18-d8-w32_2400_camvid-180x240.py',
        checkpoint='work_dirs/camvid_small/teacher/iter_2400.pth'),
    terms=dict(
        channel=dict(
            tap='decode_head.conv_seg',
            loss=dict(type='mmstructkd.ChannelwiseKLLoss', temperature=1.0, loss_weight=5.0))))
