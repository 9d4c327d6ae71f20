"""The Ray Serve application as Ray reads it; deploy/ray/check.py runs it."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from deploy.ray.app import FleetArgs, FleetGateway, Replica, build
from rtap_core.errors import ConfigError
from rtap_server.settings import Settings

CONFIG: dict[str, Any] = yaml.safe_load(
    (Path(__file__).resolve().parents[2] / "deploy" / "ray" / "config.yaml").read_text(encoding="utf-8")
)


def test_ray_takes_the_config_and_finds_in_it_what_it_names() -> None:
    (application,) = ServeDeploySchema.model_validate(CONFIG).applications
    module, _, function = application.import_path.partition(":")
    found = getattr(importlib.import_module(module), function)
    assert found is build
    build(FleetArgs.model_validate(application.args))
    assert {deployment.name for deployment in application.deployments} <= {Replica.name, FleetGateway.name}


def test_it_is_open_to_this_machine_only_until_somebody_says_otherwise() -> None:
    assert CONFIG["http_options"]["host"] == "127.0.0.1"


def test_a_replica_is_given_longer_to_leave_than_a_request_may_take() -> None:
    longest = Settings.model_fields["deadline_seconds_limit"].default
    for deployment in (Replica, FleetGateway):
        assert deployment._deployment_config.graceful_shutdown_timeout_s > longest


def test_stickiness_is_rays_consistent_hashing() -> None:
    """A name that Ray resolves when a replica starts: a wrong one would be told too late."""
    name = Replica._deployment_config.request_router_config.request_router_class
    module, _, router = str(name).rpartition(".")
    assert router == "ConsistentHashRouter"
    assert hasattr(importlib.import_module(module), router)


def test_what_cannot_work_is_refused_before_any_replica_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--port"):
        build(FleetArgs(flags=["--port", "1"]))
    with pytest.raises(ConfigError):
        build(FleetArgs(api_keys_file=tmp_path / "missing.toml"))
    with pytest.raises(ValidationError):
        FleetArgs.model_validate({"flag": []})
