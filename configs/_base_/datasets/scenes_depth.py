# Embedded scenes, depth in metres: rendered while training, nothing to download.
_base_ = './scenes_seg.py'
dataset_type = 'mmstructkd.SceneDepthDataset'
load = [
    dict(type='mmstructkd.LoadScene'),
    dict(type='mmstructkd.LoadSceneAnnotations', with_seg=False, with_depth=True),
]
train_pipeline = [*load, dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')]
test_pipeline = [*load, dict(type='PackSegInputs')]
train_dataloader = dict(dataset=dict(type=dataset_type, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type=dataset_type, pipeline=test_pipeline))
test_dataloader = val_dataloader

# 0 is no reading; the sensor ends at 24 m
val_evaluator = dict(_delete_=True, type='DepthMetric', min_depth_eval=0.1, max_depth_eval=24.5)
test_evaluator = val_evaluator
