# Train the teacher first: python tools/train.py configs/plain/depth-fpn_r101_4xb4-40k_nyu-480x480.py
# (or `mim train mmstructkd` with the same config); nobody publishes weights of this network.
_base_ = ['../plain/depth-fpn_r18_4xb4-40k_nyu-480x480.py', '../_base_/distill/normals.py']
custom_imports = dict(imports=['mmstructkd'])
teacher_checkpoint = 'work_dirs/depth-fpn_r101_4xb4-40k_nyu-480x480/iter_40000.pth'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/depth-fpn_r101_4xb4-40k_nyu-480x480.py',
        checkpoint=teacher_checkpoint),
    terms=_base_.normals_terms)
