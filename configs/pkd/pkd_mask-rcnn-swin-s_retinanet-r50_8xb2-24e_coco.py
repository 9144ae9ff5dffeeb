# The teacher has 48.2 box AP by mmdetection's metafile, the student alone 37.4.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_2x_coco.py', '../_base_/distill/pkd.py']
custom_imports = dict(imports=['mmstructkd'])
teacher_checkpoint = 'https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco_20210903_104808-b92c91f1.pth'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py',
        checkpoint=teacher_checkpoint),
    terms=dict(
        # the teacher begins at stride 4, the student at 8: strides 8 to 64 meet
        feature=dict(
            tap=dict(student='neck[:4]', teacher='neck[*]'),
            loss=_base_.pkd_terms.feature.loss)))
