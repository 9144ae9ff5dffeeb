# Depth of a kitchen (7-Scenes, red kitchen), 320x240, for small models on a CPU: crops of 160x224 (height x width)
# for training, whole images for validation. Nothing is resized, so that a metre keeps its size in pixels.
# The data lie in data/kitchen, or in $MMSTRUCTKD_DATA/kitchen if that variable is set.
dataset_type = 'mmstructkd.DepthFolderDataset'
data_root = '{{$MMSTRUCTKD_DATA:data}}/kitchen'
crop_size = (160, 224)
# files are in millimetres, 0 is no reading
load_depth = dict(type='LoadDepthAnnotation', depth_rescale_factor=1e-3)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    load_depth,
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomCrop', crop_size=crop_size),
    # one room, one light: half of mmseg's usual strength
    dict(
        type='PhotoMetricDistortion',
        brightness_delta=16,
        contrast_range=(0.75, 1.25),
        saturation_range=(0.75, 1.25),
        hue_delta=9),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    load_depth,
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='img/train', depth_map_path='depth/train'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='img/val', depth_map_path='depth/val'),
        test_mode=True,
        pipeline=test_pipeline))
test_dataloader = val_dataloader

# readings lie between 0.8 and 4 m; 0, which is none, is left out
val_evaluator = dict(type='DepthMetric', min_depth_eval=1e-3, max_depth_eval=10.0)
test_evaluator = val_evaluator
