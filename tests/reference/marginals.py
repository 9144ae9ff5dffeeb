"""Structured distributions, by going through everything that can be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tests.reference.logits import probabilities


def sequences(
    scores: Tensor, transitions: Tensor, start: Tensor, end: Tensor, temperature: float
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Every label sequence of one chain (N, K) and its score over T."""
    length, labels = scores.shape
    for sequence in itertools.product(range(labels), repeat=length):
        total = start[sequence[0]] + end[sequence[-1]]
        for i, label in enumerate(sequence):
            total = total + scores[i, label]
            if i:
                total = total + transitions[label, sequence[i - 1]]
        yield sequence, total / temperature


def distribution(*chain: Tensor, temperature: float = 1.0) -> tuple[list[tuple[int, ...]], Tensor, Tensor]:
    """Sequences, their probabilities, and the logarithm of the sum."""
    found = list(sequences(*chain, temperature))
    values = torch.stack([score for _, score in found])
    return [sequence for sequence, _ in found], values.softmax(0), values.logsumexp(0)


def marginals(*chain: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    every, chances, log_partition = distribution(*chain, temperature=temperature)
    length, labels = chain[0].shape
    nodes, pairs = torch.zeros(length, labels).to(chances), torch.zeros(length - 1, labels, labels).to(chances)
    for sequence, chance in zip(every, chances, strict=True):
        for i, label in enumerate(sequence):
            nodes = nodes + chance * _one(nodes, i, label)
            if i:
                pairs = pairs + chance * _one(pairs, i - 1, label, sequence[i - 1])
    return nodes, pairs, log_partition


def _one(like: Tensor, *place: int) -> Tensor:
    one = torch.zeros_like(like)
    one[place] = 1
    return one


def cross_entropy(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float) -> Tensor:
    """One chain: minus the teacher's mean of the student's log-probability of a sequence."""
    _, chances, _ = distribution(*teacher, temperature=temperature)
    _, own, _ = distribution(*student, temperature=temperature)
    return -(chances.detach() * own.log()).sum() * temperature**2


def queries(classes: Tensor, masks: Tensor, rule: str, background: bool, eps: float) -> Tensor:
    """(B, C, H, W) probabilities, pixel by pixel."""
    batch, number, columns = classes.shape
    kept = columns - background
    height, width = masks.shape[2:]
    out = torch.zeros(batch, kept, height, width).to(masks)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                evidence = []
                for c in range(kept):
                    present = [
                        probabilities(classes[b, q], 1.0)[c] / (1 + (-masks[b, q, y, x]).exp()) for q in range(number)
                    ]
                    if rule == 'sum':
                        evidence.append(sum(present) + eps)
                    else:
                        absent = torch.ones(()).to(masks)
                        for chance in present:
                            absent = absent * (1 - chance)
                        evidence.append(1 - absent + eps)
                for c in range(kept):
                    out = out + evidence[c] / sum(evidence) * _one(out, b, c, y, x)
    return out
