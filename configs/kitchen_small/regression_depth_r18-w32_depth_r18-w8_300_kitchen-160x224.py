# The teacher's depth as a second ground truth, also where the sensor has no reading.
_base_ = './depth_r18-w8_300_kitchen-160x224.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/depth_r18-w32_600_kitchen-160x224.py',
        checkpoint='work_dirs/kitchen_small/teacher/iter_600.pth'),
    terms=dict(
        depth=dict(
            tap='decode_head.to_depth',
            loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1', loss_weight=1.0))))
