"""Forward passes with little padding: batch rows by length, trim unused columns, find equal rows.

Lengths of recursive trajectories differ by a factor of ten. Padded to the longest row, three quarters of a batch were
padding (bundled policy, Countdown, T = 4).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]]
"""(ids, mask, completion width) -> log-probabilities and entropies, both (rows, completion width)."""


def forward_by_length(
    forward: Forward, ids: Tensor, mask: Tensor, width: int, *, rows: int
) -> tuple[Tensor, Tensor | None]:
    """Apply ``forward`` to the whole batch, in passes of at most ``rows`` rows sorted by length.

    ids, mask (B, P + width): prompts padded on the left, completions on the right. Results are 0 in trimmed columns.
    """
    order = torch.argsort(mask.sum(dim=1), stable=True)
    parts = [order[i : i + rows] for i in range(0, order.numel(), rows)]
    passes = [_trimmed(forward, ids[part], mask[part], width) for part in parts]
    back = torch.argsort(order)
    logps = torch.cat([p[0] for p in passes])[back]
    entropies = [p[1] for p in passes if p[1] is not None]
    return logps, torch.cat(entropies)[back] if entropies else None


def distinct_rows(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(indices (K,) of the first row of each kind, kind (B,) of every row). Rows of a kind have equal tokens.

    ids, mask (B, T); ids of padding are ignored.
    """
    rows = [tuple(row) for row in torch.where(mask.bool(), ids, -1).tolist()]
    firsts: dict[tuple[int, ...], int] = {}
    for index, row in enumerate(rows):
        firsts.setdefault(row, index)
    kinds = {row: kind for kind, row in enumerate(firsts)}
    return ids.new_tensor([*firsts.values()]), ids.new_tensor([kinds[row] for row in rows])


def _trimmed(forward: Forward, ids: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    used = mask.bool().any(dim=0)
    used[-width] = True  # keep a column for a batch of empty completions
    columns = torch.nonzero(used).squeeze(1)
    start, stop = int(columns[0]), int(columns[-1]) + 1
    unused = ids.size(1) - stop
    logps, entropies = forward(ids[:, start:stop], mask[:, start:stop], width - unused)
    pad = (0, unused)
    return (
        torch.nn.functional.pad(logps, pad),
        None if entropies is None else torch.nn.functional.pad(entropies, pad),
    )
