"""The part of TRL that we override or call, as ``rl/trl.py`` declares it, against the installed TRL.

A failure names the changed member; check the trainer before relying on it.
"""

import ast
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest
from trl import GRPOTrainer

import rtap_training.rl.trl
from rtap_training.rl.trainer import RecursiveTrainer


def declared() -> ast.ClassDef:
    tree = ast.parse(Path(rtap_training.rl.trl.__file__).read_text("utf-8"))
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


METHODS = {node.name: node for node in declared().body if isinstance(node, ast.FunctionDef)}
ATTRIBUTES = [
    node.target.id for node in declared().body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
]


def test_trl_is_the_version_that_was_read() -> None:
    assert version("trl").startswith("1.16.")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_the_parameters_that_we_pass(name: str) -> None:
    actual = inspect.signature(getattr(GRPOTrainer, name)).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in actual.values())
    wanted = [a.arg for a in (*METHODS[name].args.args, *METHODS[name].args.kwonlyargs)]
    assert [w for w in wanted if w not in actual and not takes_more] == []


@pytest.mark.parametrize("name", sorted(METHODS))
def test_positional_parameters_come_in_that_order(name: str) -> None:
    wanted = [a.arg for a in METHODS[name].args.args]
    actual = [p for p in inspect.signature(getattr(GRPOTrainer, name)).parameters if p in wanted]
    assert actual == wanted


def test_every_attribute_is_one_that_trl_sets_or_reads() -> None:
    """TRL sets these on instances, so the test searches its source and that of its base class."""
    source = "".join(inspect.getsource(module) for module in map(inspect.getmodule, GRPOTrainer.__mro__[:-1]) if module)
    assert [name for name in ATTRIBUTES if f"self.{name}" not in source] == []


def test_what_we_override_is_declared() -> None:
    ours = {name for name in vars(RecursiveTrainer) if name in dir(GRPOTrainer) and not name.startswith("__")}
    assert ours <= set(METHODS)


def test_rollout_fields_reach_the_rewards_as_columns() -> None:
    """TRL puts additional lists of a rollout function into ``inputs`` before ``_calculate_rewards``."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert source.index("inp[key] = values[i]") < source.index("self._calculate_rewards(inputs")
    assert 'extra_fields.pop("env_mask"' in inspect.getsource(GRPOTrainer._generate)


def test_every_tensor_with_rows_is_shuffled_and_split_along() -> None:
    import torch
    from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

    batch = {"completion_ids": torch.arange(8).reshape(4, 2), "teacher_per_token_logps": torch.arange(8).reshape(4, 2)}
    parts = split_tensor_dict(shuffle_sequence_dict(batch), 2)
    assert all(p["completion_ids"].equal(p["teacher_per_token_logps"]) for p in parts)
    assert {p["completion_ids"].shape for p in parts} == {(2, 2)}
