# Train the teacher first: python tools/train.py configs/plain/pspnet_r101-d8_1xb8-20k_camvid-360x480.py
# (or `mim train mmstructkd` with the same config); nobody publishes weights of this network for CamVid.
_base_ = ['../plain/pspnet_r18-d8_1xb8-20k_camvid-360x480.py', '../_base_/distill/structkd.py']
custom_imports = dict(imports=['mmstructkd'])
teacher_checkpoint = 'work_dirs/pspnet_r101-d8_1xb8-20k_camvid-360x480/iter_20000.pth'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/pspnet_r101-d8_1xb8-20k_camvid-360x480.py',
        checkpoint=teacher_checkpoint),
    terms=_base_.structkd_terms)
