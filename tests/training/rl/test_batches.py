"""Forward passes by length equal one padded pass; equal rows are found."""

import torch
from torch import Tensor

from rtap_training.rl.batches import distinct_rows, forward_by_length

PROMPTS = [3, 1, 2, 3, 2]
COMPLETIONS = [2, 9, 1, 4, 0]
WIDTH = 12  # wider than any row


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.arange(5 * (4 + WIDTH)).reshape(5, 4 + WIDTH)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        mask[row, 4 - prompt : 4 + completion] = 1
    return ids, mask


def forward(ids: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """A stand-in whose result depends on the row's own tokens only, as a causal model's does."""
    summed = torch.cumsum(ids * mask, dim=1)[:, -width:].double()
    return summed * mask[:, -width:], -summed * mask[:, -width:]


def test_results_are_those_of_one_padded_pass_whatever_the_split() -> None:
    ids, mask = batch()
    whole, entropy = forward(ids, mask, WIDTH)
    for rows in (1, 2, 3, 5, 9):
        logps, entropies = forward_by_length(forward, ids, mask, WIDTH, rows=rows)
        assert entropies is not None
        assert torch.equal(logps, whole)
        assert torch.equal(entropies, entropy)


def test_no_column_is_computed_that_no_row_of_the_pass_uses() -> None:
    ids, mask = batch()
    shapes: list[tuple[int, int, int]] = []

    def note(ids: Tensor, mask: Tensor, width: int) -> tuple[Tensor, None]:
        shapes.append((ids.size(0), ids.size(1), width))
        return torch.zeros(ids.size(0), width), None

    forward_by_length(note, ids, mask, WIDTH, rows=2)
    # Rows by used columns: 2 (2+0), 3 (2+1); 5 (3+2), 7 (3+4); 10 (1+9). An empty completion keeps one column.
    assert shapes == [(2, 3, 1), (2, 7, 4), (1, 10, 9)]


def test_the_gradient_reaches_every_row_as_in_one_pass() -> None:
    ids, mask = batch()
    weight = torch.ones(int(ids.max()) + 1, dtype=torch.float64, requires_grad=True)

    def read(ids: Tensor, mask: Tensor, width: int) -> tuple[Tensor, None]:
        return (weight[ids] ** 2 * mask)[:, -width:], None

    read(ids, mask, WIDTH)[0].sum().backward()
    whole = weight.grad
    weight.grad = None
    forward_by_length(read, ids, mask, WIDTH, rows=2)[0].sum().backward()
    assert whole is not None
    assert weight.grad is not None
    assert torch.equal(weight.grad, whole)


def test_rows_are_of_a_kind_if_their_tokens_are_equal_at_equal_places() -> None:
    ids = torch.tensor([[9, 1, 2, 0], [9, 1, 2, 3], [7, 1, 2, 3], [9, 1, 2, 0], [7, 1, 2, 8]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0]])
    firsts, kinds = distinct_rows(ids, mask)
    assert firsts.tolist() == [0, 1, 3]  # the last token of row 3 is id 0, not padding
    assert kinds.tolist() == [0, 1, 1, 2, 0]
    assert [part.tolist() for part in distinct_rows(ids[:0], mask[:0])] == [[], []]
