# Embedded scenes, boxes: rendered while training, nothing to download.
_base_ = './scenes_seg.py'
dataset_type = 'mmstructkd.SceneDetDataset'
load = [dict(type='mmstructkd.LoadScene'), dict(type='LoadAnnotations', with_bbox=True)]
train_pipeline = [*load, dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]
# 'instances' is where CocoMetric finds the truth, since there is no annotation file
meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances')
test_pipeline = [*load, dict(type='PackDetInputs', meta_keys=meta_keys)]
train_dataloader = dict(dataset=dict(type=dataset_type, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type=dataset_type, pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(_delete_=True, type='CocoMetric', metric='bbox')
test_evaluator = val_evaluator
