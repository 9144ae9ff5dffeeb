# The teacher has 43.57 mIoU by mmsegmentation's metafile.
_base_ = ['../plain/pspnet_r18-d8_4xb4-80k_ade20k-512x512.py', '../_base_/distill/cwd.py']
custom_imports = dict(imports=['mmstructkd'])
teacher_checkpoint = 'https://mmassets.onedl.ai/mmsegmentation/v0.5/pspnet/pspnet_r101-d8_512x512_80k_ade20k/pspnet_r101-d8_512x512_80k_ade20k_20200614_031423-b6e782f0.pth'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmseg::pspnet/pspnet_r101-d8_4xb4-80k_ade20k-512x512.py',
        checkpoint=teacher_checkpoint),
    terms=_base_.cwd_terms)
