# DFA: a mix of the teacher's blocks. tools/search_layers.py on this file prints `weights=[...]` to stand for `entropy_floor`,
# with which the weights are learned along the way.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    terms=dict(feature=dict(
        tap=dict(student='backbone.layer3', teacher=['backbone.layer3.0', 'backbone.layer3.1']),
        connector=dict(type='mmstructkd.LayerMixConnector', entropy_floor=0.5),
        loss=dict(type='mmstructkd.FeatureMSELoss'))))
