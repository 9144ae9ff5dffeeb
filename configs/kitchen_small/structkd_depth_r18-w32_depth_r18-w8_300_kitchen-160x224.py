# StructKD for depth: affinities of the decoder's feature, and a critic of depth maps; as published, no pixel-wise term.
_base_ = './depth_r18-w8_300_kitchen-160x224.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/depth_r18-w32_600_kitchen-160x224.py',
        checkpoint='work_dirs/kitchen_small/teacher/iter_600.pth'),
    terms=dict(
        # 10, the published weight, is nearly all of the gradient here: depth losses are small numbers
        pairwise=dict(
            tap='decode_head.convs', loss=dict(type='mmstructkd.PairwiseAffinityLoss', loss_weight=1.0)),
        # the critic is a quarter as wide as the published one
        holistic=dict(
            tap='decode_head.to_depth',
            loss=dict(type='mmstructkd.HolisticLoss', softmax=False, normalize='depth', critic=dict(base_channels=16)))))
