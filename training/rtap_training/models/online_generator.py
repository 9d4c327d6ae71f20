"""Online confidence generator: scores cycles and is updated on them before each policy update.

Works with any ``…ForSequenceClassification`` checkpoint with one label. It has a separate optimiser, and its state is
part of the checkpoint.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rtap_core.adapters import is_adapter, load_adapter, read_backbone
from rtap_core.errors import ConfigError
from rtap_training.data.examples import Example, balance, collect, group, read_once
from rtap_training.rl.rollouts import Rollout

GPU_BATCH_TOKENS, CPU_BATCH_TOKENS = 8192, 2048  # on a CPU padding costs more than small batches
MAX_GRADIENT_NORM = 1.0


class LabelledCycle(NamedTuple):
    """One cycle with an answer. ids: prompt and cycle."""

    question: str
    ids: tuple[int, ...]
    is_right: bool


def labelled_cycles(rollouts: Iterable[Rollout]) -> list[LabelledCycle]:
    """Cycles with an answer of these rollouts."""
    return [
        LabelledCycle(r.question, (*r.prompt_ids, *c.ids), c.is_right)
        for r in rollouts
        for c in r.cycles
        if c.answer is not None
    ]


def weighted_examples(cycles: Sequence[LabelledCycle], *, global_weight: float) -> list[Example]:
    """Distinct cycles with their weights (R-TAP eq. 6); those without weight are left out."""
    names = {name: index for index, name in enumerate(dict.fromkeys(c.question for c in cycles))}
    rows = ((names[c.question], c.ids, c.is_right) for c in cycles)
    return [e for e in balance(collect(rows), global_weight=global_weight) if e.weight]


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, T) and their mask (B, T)."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    return ids, (torch.arange(width)[None] < lengths[:, None]).long()


class OnlineGenerator:
    """A generator that is trained along with the policy.

    average: replaces tensors by their means over the processes; called once per update in every process.
    bf16: compute in bfloat16.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        learning_rate: float,
        iterations: int,
        global_weight: float,
        average: Callable[[Sequence[Tensor]], None],
        bf16: bool = False,
    ) -> None:
        self.model = model.train()
        self._bf16 = bf16
        self._iterations = iterations
        self._global_weight = global_weight
        self._average = average
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(self._parameters, lr=learning_rate, weight_decay=0.0)

    def score(self, rows: Sequence[tuple[int, ...]]) -> list[float]:
        """Confidence in [0, 1] of every row of prompt and cycle ids; equal rows are read once."""
        return score_rows(self.model, rows, bf16=self._bf16)

    def update(self, cycles: Sequence[LabelledCycle], *, rank: int = 0, num_processes: int = 1) -> float | None:
        """Minimise the balanced cross-entropy (R-TAP eq. 6) on these cycles for ``iterations`` steps.

        cycles: of all processes, the same list in each, because weights are balanced over whole questions; each process
        reads its share. Returns the loss before the first step; None if no question has contrast.
        """
        examples = weighted_examples(cycles, global_weight=self._global_weight)
        # The mean over processes must equal the sum over all examples.
        scale = num_processes / sum(e.weight for e in examples) if examples else 0.0
        share = sorted(examples, key=lambda e: len(e.ids))[rank::num_processes]
        first: float | None = None
        self.model.train()
        for _ in range(self._iterations):
            loss = self._descend(share, scale)
            first = loss if first is None else first
        return first if examples else None

    def _descend(self, examples: Sequence[Example], scale: float) -> float:
        self._optimiser.zero_grad(set_to_none=False)
        loss = torch.zeros((), device=self._parameters[0].device)
        for batch in group(examples, _batch_tokens(self.model)) if examples else []:
            logits = _logits(self.model, batch, bf16=self._bf16)
            labels = torch.tensor([float(e.is_right) for e in batch], device=logits.device)
            weights = torch.tensor([e.weight * scale for e in batch], device=logits.device)
            part = (F.binary_cross_entropy_with_logits(logits, labels, reduction="none") * weights).sum()
            part.backward()
            loss += part.detach()
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._average([loss, *(p.grad for p in self._parameters if p.grad is not None)])
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM)
        self._optimiser.step()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Trained weights, and the optimiser's state."""
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {"model": trained, "optimiser": self._optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of ``state_dict``."""
        self.model.load_state_dict(state["model"], strict=False)  # a frozen backbone is not in it
        self._optimiser.load_state_dict(state["optimiser"])


@torch.no_grad()
def score_rows(model: PreTrainedModel, rows: Sequence[tuple[int, ...]], *, bf16: bool = False) -> list[float]:
    """Confidence in [0, 1] of every row of prompt and cycle ids; equal rows are read once."""
    model.eval()

    def read(batch: Sequence[Example]) -> list[float]:
        return _logits(model, batch, bf16=bf16).sigmoid().tolist()

    return read_once(rows, _batch_tokens(model), read)


def _batch_tokens(model: PreTrainedModel) -> int:
    return GPU_BATCH_TOKENS if model.device.type == "cuda" else CPU_BATCH_TOKENS


def _logits(model: PreTrainedModel, batch: Sequence[Example], *, bf16: bool) -> Tensor:
    """Logits (B,) in fp32. The model pools each row's last token that is not padding."""
    ids, mask = pad_rows([e.ids for e in batch], cast(int, model.config.pad_token_id))
    ids, mask = ids.to(model.device), mask.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        return model(input_ids=ids, attention_mask=mask).logits[:, 0].float()


def train_in_fp32(model: torch.nn.Module) -> None:
    """Keep what is trained in fp32. PEFT keeps a head in the dtype of its backbone."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_online_generator(path: Path, *, bf16: bool = False) -> PreTrainedModel:
    """Load a generator in fp32: a checkpoint, or an adapter on its backbone, which is frozen and with ``bf16`` in
    bfloat16.

    Raises ConfigError unless ``path`` is a classifier with one label and a pad token."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is not a checkpoint (no config.json); train one with `rtap train generator`")
    if is_adapter(path):
        dtype = torch.bfloat16 if bf16 else torch.float32
        model = load_adapter(path, read_backbone(path), dtype, is_trainable=True)
        train_in_fp32(model)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    if model.config.num_labels != 1 or model.config.pad_token_id is None:
        raise ConfigError(f"{path} must be a sequence classifier with one label and a pad token")
    return cast(PreTrainedModel, model)
