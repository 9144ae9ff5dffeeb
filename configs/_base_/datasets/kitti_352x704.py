# KITTI depth, Eigen split: crops of 352x704 out of the benchmark's 352x1216 for training, all of that for validation,
# scored within Garg's window up to 80 m. Below data/kitti lie
#   kitti_eigen_train.txt, kitti_eigen_test.txt   lines "IMAGE DEPTH FOCAL"
#   input/DATE/DRIVE/image_02/data/NUMBER.png     the raw images
#   gt_depth/DRIVE/proj_depth/groundtruth/image_02/NUMBER.png   the maps of the depth benchmark
dataset_type = 'mmstructkd.KITTIEigenDataset'
data_root = 'data/kitti'
crop_size = (352, 704)
# files have 256 steps a metre, 0 is no reading
load_depth = dict(type='LoadDepthAnnotation', depth_rescale_factor=1 / 256)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    load_depth,
    dict(type='mmstructkd.BottomCrop', crop_size=(352, 1216)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    load_depth,
    # before the crop: its shares are of the whole image
    dict(type='mmstructkd.DepthWindow', window='garg'),
    dict(type='mmstructkd.BottomCrop', crop_size=(352, 1216)),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='kitti_eigen_train.txt',
        data_prefix=dict(img_path='input', depth_map_path='gt_depth'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='kitti_eigen_test.txt',
        data_prefix=dict(img_path='input', depth_map_path='gt_depth'),
        test_mode=True,
        pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='DepthMetric', min_depth_eval=1e-3, max_depth_eval=80.0)
test_evaluator = val_evaluator
