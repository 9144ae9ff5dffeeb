"""The mathematics of mmstructkd: tensors in, tensors out, pure torch.

First two arguments ``student, teacher``, the rest by keyword; every ``*_loss``
returns an unweighted scalar of at least float32 and detaches the teacher.
"""
