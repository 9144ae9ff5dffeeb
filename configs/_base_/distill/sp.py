# Similarity preserving: which places look alike, row by row. Published for the images of a large batch; with two images
# a process its nodes are the cells of each image instead, a port of this project's, as is the weight.
sp_terms = dict(
    similarity=dict(
        tap='decode_head.bottleneck',
        loss=dict(type='mmstructkd.SimilarityPreservingLoss', nodes='cells', loss_weight=1.0)))
