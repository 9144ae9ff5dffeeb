# Each class a yes or no of its own, weighted by the teacher's confidence: for heads whose classes are sigmoids. No
# published weight is known; 1 is this project's.
binary_terms = dict(
    pixel=dict(
        tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.BinaryKLLoss', loss_weight=1.0)))
