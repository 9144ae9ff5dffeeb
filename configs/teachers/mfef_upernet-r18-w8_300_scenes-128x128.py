# MFEF: the features of two networks that learn together, fused before one head, teach the student beside the peer.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
scores, kl = 'decode_head.conv_seg', dict(type='mmstructkd.PixelwiseKLLoss')
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teachers=dict(
        peer=dict(
            type='mmstructkd.PeerTeacher', terms=dict(back=dict(tap=scores, loss=kl)),
            config='{{ fileDirname }}/../scenes/upernet_r18-w8_300_scenes-128x128.py'),
        fused=dict(type='mmstructkd.SelfTeacher', also='peer.backbone[*]')),
    terms={
        name: dict(tap=dict(student=scores, teacher=f'{name}.{scores}'), loss=kl) for name in ('peer', 'fused')})
