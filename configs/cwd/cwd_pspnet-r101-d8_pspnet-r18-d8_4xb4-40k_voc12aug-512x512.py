# The teacher has 78.52 mIoU by mmsegmentation's metafile.
_base_ = ['../plain/pspnet_r18-d8_4xb4-40k_voc12aug-512x512.py', '../_base_/distill/cwd.py']
custom_imports = dict(imports=['mmstructkd'])
teacher_checkpoint = 'https://mmassets.onedl.ai/mmsegmentation/v0.5/pspnet/pspnet_r101-d8_512x512_40k_voc12aug/pspnet_r101-d8_512x512_40k_voc12aug_20200613_161222-bc933b18.pth'
model = dict(
    _delete_=True,
    type='mmstructkd.StructuredDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmseg::pspnet/pspnet_r101-d8_4xb4-40k_voc12aug-512x512.py',
        checkpoint=teacher_checkpoint),
    terms=_base_.cwd_terms)
