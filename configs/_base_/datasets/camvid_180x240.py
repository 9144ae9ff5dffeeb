# CamVid for short schedules on a CPU: crops of a quarter of the area, judged on whole 360x480 images.
# The smallest scale (0.5) is just one crop, so no crop is ever padded.
_base_ = './camvid_360x480.py'
crop_size = (180, 240)
train_pipeline = [
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75) if step['type'] == 'RandomCrop' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
