"""The verl recipe. verl's pins exclude this environment, so unless verl is installed its registries, aggregation and
slicing are stood in for by the few lines below, written from the signatures of verl 0.9.1."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rtap_training.losses import grpo_loss, trrd_loss
from rtap_training.recipes.verl import dataset_and_reward, trrd
from rtap_training.tasks.base import Question
from rtap_training.training_errors import TeacherError

FOLDER = Path(trrd.__file__).parent
HAS_VERL = find_spec("verl") is not None
PROMPTS, RESPONSES = [2, 3, 1], [4, 2, 3]


def no_padding_2_padding(tensor: Tensor, data: Any) -> Tensor:
    """Whole rows, one after the other -> responses (B, T), each score one place to the left of its token."""
    parts = tensor.values().split([p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    kept = [part[p - 1 : p + r - 1] for part, p, r in zip(parts, PROMPTS, RESPONSES, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)


def agg_loss(
    loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, dp_size: int = 1, batch_num_tokens: int | None = None,
    global_batch_size: int | None = None, loss_scale_factor: int | None = None,
) -> Tensor:  # fmt: skip
    assert loss_agg_mode == "seq-mean-token-mean"
    rows = (loss_mat * loss_mask).sum(-1) / (loss_mask.sum(-1) + 1e-8)
    return rows.sum() / (global_batch_size or len(rows)) * dp_size


def stand_ins() -> dict[str, ModuleType]:
    """Fake modules with verl's names."""
    names = ("", ".trainer", ".trainer.ppo", ".trainer.ppo.core_algos", ".trainer.distillation",
             ".trainer.distillation.losses", ".workers", ".workers.utils", ".workers.utils.padding")  # fmt: skip
    modules = {f"verl{name}": ModuleType(f"verl{name}") for name in names}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
    policy: dict[str, Any] = {}
    distillation: dict[str, Any] = {}

    def register_policy_loss(name: str) -> Any:
        return lambda function: policy.setdefault(name, function)

    def register_distillation_loss(loss_settings: Any) -> Any:
        return lambda function: distillation.update(dict.fromkeys(loss_settings.names, function))

    modules["verl.trainer.ppo.core_algos"].__dict__.update(
        register_policy_loss=register_policy_loss, get_policy_loss_fn=policy.__getitem__, agg_loss=agg_loss
    )
    modules["verl.trainer.distillation.losses"].__dict__.update(
        DistillationLossSettings=lambda names, use_estimator: SimpleNamespace(names=names, use_estimator=use_estimator),
        register_distillation_loss=register_distillation_loss, get_distillation_loss_fn=distillation.__getitem__,
    )  # fmt: skip
    modules["verl.workers.utils.padding"].__dict__["no_padding_2_padding"] = no_padding_2_padding
    return modules


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """verl's two lookups, with the recipe registered."""
    if not HAS_VERL:
        for name, module in stand_ins().items():
            monkeypatch.setitem(sys.modules, name, module)
        trrd.register()  # the import above found no verl
    from verl.trainer.distillation.losses import get_distillation_loss_fn
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    return SimpleNamespace(policy=get_policy_loss_fn("trrd"), distillation=get_distillation_loss_fn("trrd"))


class Batch:
    """Random rows, as verl holds them (nested, whole) and as the losses read them (B, T)."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        whole = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        self.logp_rows = torch.nested.as_nested_tensor([-torch.rand(n) for n in whole], layout=torch.jagged)
        teacher = torch.nested.as_nested_tensor([-3 * torch.rand(n, 1) for n in whole], layout=torch.jagged)
        self.data: Any = {"teacher_logprobs": teacher} | {
            name: torch.nested.as_nested_tensor(
                [torch.zeros(n, dtype=torch.long) for n in lengths], layout=torch.jagged
            )
            for name, lengths in (("prompts", PROMPTS), ("responses", RESPONSES))
        }
        if HAS_VERL:
            from tensordict import TensorDict

            self.data = TensorDict(self.data, batch_size=[len(PROMPTS)])
        self.teacher = no_padding_2_padding(teacher, None).squeeze(-1)
        self.logp = no_padding_2_padding(self.logp_rows, None).requires_grad_()
        self.mask = no_padding_2_padding(self.logp_rows * 0 + 1, None)
        self.old = (self.logp.detach() + 0.3 * torch.randn_like(self.logp)) * self.mask
        self.advantages = torch.randn(len(PROMPTS))


def losses(registered: SimpleNamespace, batch: Batch, *, share: float, clamp: float | None) -> tuple[Tensor, Any]:
    """Losses of one micro batch as verl computes them: distillation loss, then policy loss."""
    settings = SimpleNamespace(distillation_loss_coef=share, loss_max_clamp=clamp)
    zeros, _ = registered.distillation(
        config=None, distillation_config=SimpleNamespace(distillation_loss=settings),
        model_output={"log_probs": batch.logp_rows}, data=batch.data,
    )  # fmt: skip
    assert zeros.shape == batch.logp.shape
    assert not zeros.any()
    config = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28, global_batch_info={})
    return registered.policy(
        old_log_prob=batch.old, log_prob=batch.logp, advantages=batch.advantages[:, None].expand_as(batch.logp),
        response_mask=batch.mask, loss_agg_mode="seq-mean-token-mean", config=config, rollout_is_weights=None,
    )  # fmt: skip


@pytest.mark.parametrize(("share", "clamp"), [(0.5, 1.0), (0.5, None), (0.2, 0.5)])
def test_the_registered_loss_is_trrd_loss_and_so_is_its_gradient(
    registered: SimpleNamespace, share: float, clamp: float | None
) -> None:
    batch = Batch()
    loss, figures = losses(registered, batch, share=share, clamp=clamp)
    ours = trrd_loss(
        batch.logp, batch.old, batch.teacher, batch.advantages, batch.mask, alpha=1 - share, teacher_clamp=clamp
    )
    torch.testing.assert_close(loss, ours)
    torch.testing.assert_close(torch.autograd.grad(loss, batch.logp), torch.autograd.grad(ours, batch.logp))
    assert 0 < figures["actor/pg_clipfrac"] < 1


def test_without_a_share_for_the_teacher_it_is_grpo(registered: SimpleNamespace) -> None:
    batch = Batch()
    loss, _ = losses(registered, batch, share=0.0, clamp=1.0)
    torch.testing.assert_close(loss, grpo_loss(batch.logp, batch.old, batch.advantages, batch.mask))


def test_scores_are_used_once_and_their_absence_is_an_error(registered: SimpleNamespace) -> None:
    batch = Batch()
    losses(registered, batch, share=0.5, clamp=1.0)
    with pytest.raises(TeacherError, match=r"distillation\.enabled=true"):
        registered.policy(
            old_log_prob=batch.old, log_prob=batch.logp, advantages=batch.logp, response_mask=batch.mask,
            loss_agg_mode="seq-mean-token-mean", config=None,
        )  # fmt: skip


def test_questions_become_verls_columns_and_answers_are_scored() -> None:
    (row,) = dataset_and_reward.rows([Question("make 8 from 2, 3, 3", "", "countdown")], "rtap")
    assert set(row) == {"data_source", "prompt", "reward_model", "extra_info"}
    assert row["prompt"] == [{"role": "user", "content": "make 8 from 2, 3, 3"}]

    def score(text: str) -> float:
        return dataset_and_reward.compute_score("countdown", text, "", row["extra_info"])

    assert score("<think>2+3+3</think><answer>2+3+3</answer>") == 2
    assert score("<think>2*3+3</think><answer>2*3+3</answer>") == 1
    assert score("t</think><answer>2+3+3</answer>") == 2  # the chat template wrote the opening
    assert score("2+3+3") == 0


def test_the_think_format_takes_the_text_after_the_thought() -> None:
    info = {"question": "how many?", "format": "think"}
    assert dataset_and_reward.compute_score("x", "<think>t</think>\n\n8", "8", info) == 2
    assert dataset_and_reward.compute_score("x", "<think>t</think>\n\n9", "8", info) == 1


def test_question_files_hold_both_splits(tmp_path: Path) -> None:
    from datasets import load_dataset

    dataset_and_reward.main(["--output", str(tmp_path), "--count", "20", "--format", "rtap"])
    files = {"train": str(tmp_path / "train.parquet"), "val": str(tmp_path / "val.parquet")}
    sets = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in sets.items()} == {"train": 20, "val": 2}


def test_the_launch_script_is_bash_and_names_this_loss() -> None:
    script = FOLDER / "rlad.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text("utf-8")
    assert text.count("loss_mode=trrd") == 2
    assert f"VERL_USE_EXTERNAL_MODULES={trrd.__name__}" in text
    assert "Not tested:" in text
