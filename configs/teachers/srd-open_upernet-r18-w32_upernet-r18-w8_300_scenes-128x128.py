# SRD on unlabelled images: projected features, and the teacher's head on them; every image teaches.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
        checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
    streams=dict(unlabelled=dict(type='mmstructkd.DataStream')),
    terms=dict(semantic=dict(
        on=['labelled', 'unlabelled'], tap='decode_head.conv_seg',
        connector=dict(type='mmstructkd.TeacherHeadConnector', head='decode_head.conv_seg'),
        loss=dict(type='mmstructkd.FeatureMSELoss'))))
train_dataloader = dict(dataset=dict(
    _delete_=True, type='mmstructkd.PairedDataset', dataset=_base_.train_dataloader.dataset,
    unlabelled=dict(
        type='mmstructkd.SceneSegDataset', split='train', seed=1, num_scenes=800, size=(128, 128), cache=True,
        pipeline=_base_.train_pipeline)))
