# The quickstart's teacher with two auxiliary heads that tell class and turn together (HSAKD), on turned images.
_base_ = './upernet_r18-w32_800_scenes-128x128.py'
head = dict(
    type='mmstructkd.JointTurnHead',
    channels=32,
    num_convs=1,
    concat_input=False,
    num_classes=40,
    norm_cfg=_base_.norm_cfg,
    align_corners=False,
    loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0))
model = dict(auxiliary_head=[dict(in_channels=128, in_index=2, **head), dict(in_channels=256, in_index=3, **head)])
train_dataloader = dict(dataset=dict(pipeline=[*_base_.train_pipeline, dict(type='mmstructkd.TurnView')]))
