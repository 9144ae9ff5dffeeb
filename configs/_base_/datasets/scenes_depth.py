# Embedded scenes, depth in metres: rendered while training, nothing to download.
dataset_type = 'mmstructkd.SceneDepthDataset'
crop_size = (128, 128)
train_pipeline = [
    dict(type='mmstructkd.LoadScene'),
    dict(type='mmstructkd.LoadSceneAnnotations', with_seg=False, with_depth=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='mmstructkd.LoadScene'),
    dict(type='mmstructkd.LoadSceneAnnotations', with_seg=False, with_depth=True),
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

# 0 is no reading; the sensor ends at 24 m
val_evaluator = dict(type='DepthMetric', min_depth_eval=0.1, max_depth_eval=24.5)
test_evaluator = val_evaluator
