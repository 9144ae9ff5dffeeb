# Two teachers with one head each (SimReg's form): an independent projector of the student for each.
_base_ = '../scenes/upernet_r18-w8_300_scenes-128x128.py'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teachers=dict(
        big=dict(
            config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
            checkpoint='work_dirs/quickstart/teacher/iter_800.pth'),
        other=dict(
            config='{{ fileDirname }}/../scenes/upernet_r18-w32_800_scenes-128x128.py',
            checkpoint='work_dirs/second_teacher/iter_800.pth')),
    terms={
        name: dict(
            tap=dict(student='backbone[3]', teacher=f'{name}.backbone[3]'),
            connector=dict(type='mmstructkd.DeepProjectorConnector'),
            loss=dict(type='mmstructkd.StandardizedMSELoss')) for name in ('big', 'other')})
