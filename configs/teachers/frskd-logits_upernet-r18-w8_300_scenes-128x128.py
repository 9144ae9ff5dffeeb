# FRSKD without its attention maps: the twin's logits alone teach.
_base_ = './frskd_upernet-r18-w8_300_scenes-128x128.py'
model = dict(
    terms=dict(
        _delete_=True,
        logits=dict(
            tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss'),
            schedule=dict(type='ramp_up', begin=200))))
