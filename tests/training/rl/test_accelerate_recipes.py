"""The files under recipes/accelerate are valid for accelerate's parser. Nothing is launched."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from rtap_training.config.rl import RlConfig

FOLDER = Path(__file__).parents[3] / "training" / "rtap_training" / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
SHARDED = [file for file in FILES if file.stem != "one_gpu"]


def names(files: list[Path]) -> list[str]:
    return [file.stem for file in files]


def head(file: Path) -> str:
    """Leading comment of a file as one line."""
    lines = file.read_text("utf-8").split("compute_environment")[0].splitlines()
    return " ".join(word for line in lines for word in line.removeprefix("#").rstrip("\\").split())


def test_there_is_one_file_for_each_way_of_launching() -> None:
    assert names(FILES) == ["fsdp2_multi_node", "fsdp2_single_node", "one_gpu", "rollouts_on_vllm_server"]


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_accelerate_reads_every_field(file: Path) -> None:
    """The parser rejects unknown top-level keys but ignores unknown keys of fsdp_config."""
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= known


@pytest.mark.parametrize("file", SHARDED, ids=names(SHARDED))
def test_launching_asks_for_fsdp2_with_every_process_loading(file: Path) -> None:
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "-m", "rtap_training", "rtap"])
    )
    environment = prepare_multi_gpu_env(args)
    assert load_config_from_file(str(file)).distributed_type is DistributedType.FSDP
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_the_commands_in_the_head_use_flags_that_exist(file: Path) -> None:
    commands = re.findall(r"accelerate launch (--config_file \S+)(.*?)-m rtap_training rtap (.*?)…", head(file))
    assert len(commands) == 1
    config, launch, training = commands[0]
    assert config.split()[1] == f"training/rtap_training/recipes/accelerate/{file.name}"
    assert set(re.findall(r"--\w+", launch)) <= {o for a in launch_command_parser()._actions for o in a.option_strings}
    ours = {f"--{name.replace('_', '-')}" for name in RlConfig.__dataclass_fields__}
    assert set(re.findall(r"--[a-z0-9-]+", training)) <= ours
