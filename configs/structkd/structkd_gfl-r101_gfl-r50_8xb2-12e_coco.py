# The teacher has 44.7 box AP by mmdetection's metafile, the student alone 40.2.
_base_ = ['mmdet::gfl/gfl_r50_fpn_1x_coco.py', '../_base_/distill/structkd_fpn.py']
custom_imports = dict(imports=['mmstructkd'])
teacher_checkpoint = 'https://download.openmmlab.com/mmdetection/v2.0/gfl/gfl_r101_fpn_mstrain_2x_coco/gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py',
        checkpoint=teacher_checkpoint),
    terms=dict(
        # not the class scores: GFL's are its judgement of its own boxes, and the teacher's boxes are better
        edges=dict(
            # behind the factor that the head learns for each level
            tap=[f'bbox_head.scales.{level}' for level in range(5)],
            loss=dict(type='mmstructkd.LocalizationKLLoss', loss_weight=0.25)),
        pairwise=_base_.structkd_terms.pairwise))
