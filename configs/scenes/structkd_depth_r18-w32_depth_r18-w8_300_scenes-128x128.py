# The distilled student of the quickstart for depth: affinities of the decoder's feature, and the teacher's depth.
# The quickstart trains the teacher; elsewhere: --cfg-options model.teacher.checkpoint=PATH
_base_ = './depth_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/depth_r18-w32_500_scenes-128x128.py',
        checkpoint='work_dirs/quickstart_depth/teacher/iter_500.pth'),
    terms=dict(
        pairwise=dict(
            tap='decode_head.convs', loss=dict(type='mmstructkd.PairwiseAffinityLoss', loss_weight=1.0)),
        # where there is a reading: elsewhere is the sky, whose depth the teacher does not know either
        depth=dict(
            tap='decode_head.to_depth',
            loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1', where='labelled', loss_weight=0.2))))
