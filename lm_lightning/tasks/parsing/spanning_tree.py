"""Spanning trees: how well each word may hang on each other in, the best tree out."""

import numpy as np


def spanning_tree(scores: np.ndarray) -> np.ndarray:
    """The tree with the highest sum of scores in which one word hangs on the root.

    By the algorithm of Chu and Liu (1965) and Edmonds (1967), with a fine for each word on the root that is larger than
    what a tree could gain by a second one.

    Args:
        scores: Of each word's heads, (W, 1 + W) float64: the root and the words; -inf for what may not be.

    Returns:
        The head of each word, (W,) int64: 0 for the root, else 1 + the word's number.
    """
    words = len(scores)
    square = np.full((words + 1, words + 1), -np.inf)
    square[1:] = scores
    np.fill_diagonal(square, -np.inf)
    finite = square[np.isfinite(square)]
    square[1:, 0] -= 1 + words * (finite.max() - finite.min())
    return arborescence(square)[1:]


def arborescence(scores: np.ndarray) -> np.ndarray:
    """The best heads of all nodes, (N,) int64, from the scores of node by head, (N, N) float64; node 0 is the root."""
    heads = scores.argmax(1)
    heads[0] = 0
    cycle = find_cycle(heads)
    if cycle is None:
        return heads
    # The cycle becomes one node, the last one: what enters it takes the place of one of its arcs, what it loses.
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
    """The nodes of a cycle, if there is one that does not end at node 0."""
    state = np.zeros(len(heads), int)  # the walk in which a node was first seen
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
