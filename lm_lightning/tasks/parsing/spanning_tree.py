"""Spanning trees: finds the best dependency tree for the scores of all possible heads of each word."""

import numpy as np


def spanning_tree(scores: np.ndarray) -> np.ndarray:
    """The tree with the highest sum of scores in which exactly one word has the root as its head.

    It is found by the algorithm of Chu and Liu (1965) and Edmonds (1967), with a penalty for each word whose head is
    the root; the penalty exceeds what a tree could gain by a second such word.

    Args:
        scores: For each word, the scores of the root and of all words as its head, (W, 1 + W) float64; -inf for heads
            that are not allowed.

    Returns:
        The head of each word, (W,) int64: 0 for the root, otherwise 1 + the index of the head.
    """
    words = len(scores)
    square = np.full((words + 1, words + 1), -np.inf)
    square[1:] = scores
    np.fill_diagonal(square, -np.inf)
    finite = square[np.isfinite(square)]
    square[1:, 0] -= 1 + words * (finite.max() - finite.min())
    return arborescence(square)[1:]


def arborescence(scores: np.ndarray) -> np.ndarray:
    """The best heads of all nodes, (N,) int64, for scores of nodes by heads, (N, N) float64; node 0 is the root."""
    heads = scores.argmax(1)
    heads[0] = 0
    cycle = find_cycle(heads)
    if cycle is None:
        return heads
    # The cycle is contracted to a single node, the last one. An arc that enters it replaces one of the arcs of the
    # cycle, whose score is subtracted.
    inside = np.zeros(len(heads), bool)
    inside[cycle] = True
    outside = np.flatnonzero(~inside)
    entering = scores[np.ix_(cycle, outside)] - scores[cycle, heads[cycle]][:, None]
    leaving = scores[np.ix_(outside, cycle)]
    smaller = np.full((len(outside) + 1, len(outside) + 1), -np.inf)
    smaller[:-1, :-1] = scores[np.ix_(outside, outside)]
    smaller[-1, :-1] = entering.max(0)
    smaller[:-1, -1] = leaving.max(1)
    below = arborescence(smaller)
    for number, node in enumerate(outside[1:], start=1):
        head = below[number]
        heads[node] = cycle[leaving[number].argmax()] if head == len(outside) else outside[head]
    entered = cycle[entering[:, below[-1]].argmax()]
    heads[entered] = outside[below[-1]]
    return heads


def find_cycle(heads: np.ndarray) -> np.ndarray | None:
    """The nodes of a cycle; None if all paths end at node 0."""
    state = np.zeros(len(heads), int)  # number of the path in which a node was first visited
    state[0] = -1
    for start in range(1, len(heads)):
        node = start
        while not state[node]:
            state[node] = start
            node = heads[node]
        if state[node] == start:
            cycle = [node]
            while heads[cycle[-1]] != node:
                cycle.append(heads[cycle[-1]])
            return np.array(cycle)
    return None
