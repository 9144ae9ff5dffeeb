# Local structure: how like each of its eight neighbours a place is. From graphs to the grid, and its weight: this
# project's.
lsp_terms = dict(
    neighbours=dict(
        tap='decode_head.bottleneck',
        loss=dict(type='mmstructkd.LocalStructureLoss', radius=1, loss_weight=1.0)))
