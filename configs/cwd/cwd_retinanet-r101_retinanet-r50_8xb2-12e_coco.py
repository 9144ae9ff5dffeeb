# The teacher has 38.9 box AP by mmdetection's metafile, the student alone 36.5.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '../_base_/distill/cwd_fpn.py']
custom_imports = dict(imports=['mmstructkd'])
teacher_checkpoint = 'https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        checkpoint=teacher_checkpoint),
    terms=_base_.cwd_terms)
