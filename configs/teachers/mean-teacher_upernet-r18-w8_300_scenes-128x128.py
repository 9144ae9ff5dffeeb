# A mean teacher with unlabelled images: the student's average on the mirrored image, of both kinds.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(type='mmstructkd.ViewTeacher', flip=True, momentum=0.99),
    streams=dict(unlabelled=dict(type='mmstructkd.DataStream')),
    terms=dict(kd=dict(
        on=['labelled', 'unlabelled'], tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss'),
        schedule=dict(type='ramp_up', end=150))))
train_dataloader = dict(dataset=dict(
    _delete_=True, type='mmstructkd.PairedDataset', dataset=_base_.train_dataloader.dataset,
    unlabelled=dict(
        type='mmstructkd.SceneSegDataset', split='train', seed=1, num_scenes=800, size=(128, 128), cache=True,
        pipeline=_base_.train_pipeline)))
