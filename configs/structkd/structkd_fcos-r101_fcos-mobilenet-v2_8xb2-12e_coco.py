# The teacher has 40.8 box AP by mmdetection's metafile.
_base_ = ['../plain/fcos_mobilenet-v2_8xb2-12e_coco.py', '../_base_/distill/structkd_fpn.py']
custom_imports = dict(imports=['mmstructkd'])
teacher_checkpoint = 'https://download.openmmlab.com/mmdetection/v2.0/fcos/fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco/fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco-511424d6.pth'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::fcos/fcos_r101-caffe_fpn_gn-head_ms-640-800-2x_coco.py',
        checkpoint=teacher_checkpoint),
    terms=dict(
        pixel=dict(
            tap='bbox_head.conv_cls',
            loss=dict(type='mmstructkd.BinaryKLLoss', loss_weight=1.0)),
        pairwise=_base_.structkd_terms.pairwise))
