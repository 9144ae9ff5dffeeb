# Embedded scenes, class masks: rendered while training, nothing to download.
dataset_type = 'mmstructkd.SceneSegDataset'
crop_size = (128, 128)
train_pipeline = [
    dict(type='mmstructkd.LoadScene'),
    dict(type='mmstructkd.LoadSceneAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='mmstructkd.LoadScene'),
    dict(type='mmstructkd.LoadSceneAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        split='train',
        num_scenes=800,
        size=crop_size,
        cache=True,
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        split='val',
        num_scenes=200,
        size=crop_size,
        test_mode=True,
        pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
