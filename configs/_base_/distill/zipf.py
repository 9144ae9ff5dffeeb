# Zipf's label smoothing, ported to maps: the pixels of a window vote for the wrong classes of its centre. The student's
# own votes, as published: the teacher is not needed, and voter='teacher' asks it. The weight is the authors' for ImageNet.
zipf_terms = dict(
    pixel=dict(
        tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.ZipfLabelLoss', kernel_size=7, loss_weight=0.1)))
