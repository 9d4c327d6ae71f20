"""One model over several devices or nodes is vLLM's own Ray back end: its flags reach it, nonsense ends the start."""

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

import rtap_server.engine.reasoning_parser  # noqa: F401 - registers itself, as its plugin flag makes vLLM do
from rtap_core.errors import ConfigError
from rtap_server.__main__ import _parse
from rtap_server.engine.engine_config import cpu_defaults
from rtap_server.engine.loading import start_engines


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--tensor-parallel-size 2 --distributed-executor-backend ray", (2, 1, 1, "ray")),
        ("--pipeline-parallel-size 2 --distributed-executor-backend ray", (1, 2, 1, "ray")),
        ("--data-parallel-size 2 --data-parallel-backend ray", (1, 1, 2, "ray")),
    ],
)
def test_parallelism_reaches_vllm(flags: str, expected: tuple[int, int, int, str]) -> None:
    args, _, bundled = _parse(flags.split())
    cpu_defaults(args, bundled=bundled)
    parallel = AsyncEngineArgs.from_cli_args(args).create_engine_config().parallel_config
    sizes = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size)
    assert (*sizes, parallel.distributed_executor_backend) == expected


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--tensor-parallel-size 0", "tensor_parallel_size"),
        ("--tensor-parallel-size 5", "must be divisible by tensor parallel size (5)"),
        ("--data-parallel-backend carrier-pigeon", "data_parallel_backend can only be ray or mp"),
    ],
)
async def test_what_cannot_be_split_so_is_one_sentence(flags: str, sentence: str) -> None:
    args, settings, bundled = _parse(flags.split())
    cpu_defaults(args, bundled=bundled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rtap_server.engine.loading._load", lambda *_, **__: pytest.fail("an engine was started"))
        with pytest.raises(ConfigError) as raised:
            async with start_engines(args, settings):
                pass
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)
