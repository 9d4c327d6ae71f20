"""Build the Dockerfile without a Docker daemon and run its image locked down.

buildah builds it on a base made by debootstrap: Debian of the same release with Debian's Python. The server runs in
its own mount, process and network namespaces with the image's entry point, environment, user and health check:
read-only root, no capabilities, only /cache, /tmp and /dev/shm writable. Needs root, buildah, debootstrap and 20 GB.
Docker's own engine and the published base image are not covered.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "image"
NOT_COVERED = (
    "Docker's engine and BuildKit: buildah runs the steps; unshare, chroot and setpriv run the server.",
    "The published base image: the base here is made by debootstrap and has Debian's Python.",
    "The `cuda` target.",
)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INSIDE = Path(__file__).with_name("verify_inside.py")


class VerifyError(Exception):
    """One sentence: what is missing or failed."""


@dataclass(frozen=True, slots=True)
class Base:
    """Base image of the Dockerfile and its Debian release."""

    image: str
    release: str


def base_of(dockerfile: str) -> Base:
    """The only external base image."""
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE)) | {"scratch"}
    external = set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) - stages
    if len(external) != 1:
        raise VerifyError(f"the Dockerfile must have one external base image, not {sorted(external)}")
    image = external.pop()
    return Base(image, image.split("@")[0].rsplit("-", 1)[-1])


@dataclass(frozen=True, slots=True)
class Buildah:
    """buildah with its storage in a separate folder."""

    folder: Path

    def prepare(self) -> None:
        """Write its configuration: own storage, no registry, no signatures."""
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{self.folder}/root"\nrunroot = "{self.folder}/run"\n'
        (self.folder / "storage.conf").write_text(storage, encoding="utf-8")
        (self.folder / "registries.conf").write_text("unqualified-search-registries = []\n", encoding="utf-8")
        (self.folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}', encoding="utf-8")

    def __call__(self, command: str, *arguments: str | Path) -> str:
        """Run a command. Returns its stdout."""
        named = {"storage.conf": "CONTAINERS_STORAGE_CONF", "registries.conf": "CONTAINERS_REGISTRIES_CONF"}
        environment = {**os.environ, **{variable: str(self.folder / file) for file, variable in named.items()}}
        signed = ["--signature-policy", self.folder / "policy.json"] if command in ("build", "commit", "from") else []
        line = ["buildah", command, *signed, *arguments]
        return subprocess.run(line, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout.strip()


def make_base(buildah: Buildah, base: Base, folder: Path) -> None:
    """Build Debian of the base's release under the base's name, with Python at the same path."""
    if not folder.exists():
        packages = "--include=python3,python3-venv,ca-certificates"
        line = ["debootstrap", "--variant=minbase", packages, base.release, folder]
        subprocess.run(line, check=True, stdout=sys.stderr)
        (folder / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, folder, "/")
    buildah("config", "--env", f"PATH={PATH}", container)
    buildah("commit", "--quiet", "--rm", container, f"docker.io/library/{base.image}")


def pip_volumes(folder: Path) -> list[str]:
    """Mounts of this machine's pip configuration and of the local folders that it names; in no layer of the image."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    values = {
        key: value.strip("'\"")
        for line in listed.splitlines()
        for key, _, value in [re.sub(r"^(global|install|:env:)\.", "", line).partition("=")]
    }
    config = folder / "pip.conf"
    config.write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in values.items()), encoding="utf-8")
    named = {Path(word.removeprefix("file://")) for value in values.values() for word in value.split()}
    # An index folder "simple" links into its sibling folders.
    local = {path.parent if path.name == "simple" else path for path in named if path.is_absolute() and path.exists()}
    mounts = {config: Path("/etc/pip.conf")} | {path: path for path in local}
    return [part for source, target in mounts.items() for part in ("--volume", f"{source}:{target}:ro")]


def build(buildah: Buildah, target: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """(mounted root file system, the image's configuration) of the Dockerfile's ``target``."""
    buildah(
        "build", "--isolation", "chroot", "--pull-never", "--format", "docker", "--target", target,
        "--tag", "rtap:verify", *pip_volumes(folder), ROOT,
    )  # fmt: skip
    container = buildah("from", "--pull-never", "localhost/rtap:verify")
    inspected: dict[str, Any] = json.loads(buildah("inspect", container))
    return Path(buildah("mount", container)), inspected["Docker"]["config"]


def run_locked_down(root: Path, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run the image's server in new namespaces. Returns the observations."""
    seen = folder / "seen.json"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    namespaces = ["unshare", "--mount", "--net", "--pid", "--ipc", "--fork", "--kill-child"]
    subprocess.run([*namespaces, sys.executable, INSIDE, root, folder / "config.json", seen], check=True)
    found: dict[str, Any] = json.loads(seen.read_text(encoding="utf-8"))
    return found


def report(found: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """The report."""
    lines = ["# The image, verified without a Docker daemon", "", *(f"- {k}: `{v}`" for k, v in run.items()), ""]
    lines += ["| check | result |", "|---|---|", *(f"| {k} | {v} |" for k, v in found.items()), ""]
    return "\n".join([*lines, "Not covered:", "", *(f"- {sentence}" for sentence in NOT_COVERED), ""])


def verify(target: str, folder: Path, base_folder: Path, output: Path, command: Sequence[str]) -> None:
    """Build, run and report. Raises VerifyError or CalledProcessError when something fails."""
    missing = [tool for tool in ("buildah", "debootstrap", "unshare", "setpriv") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        raise VerifyError(f"run this as root with buildah, debootstrap and util-linux installed; missing: {missing}")
    started, base = datetime.now(UTC), base_of((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    buildah = Buildah(folder / "buildah")
    buildah.prepare()
    make_base(buildah, base, base_folder)
    began = time.monotonic()
    root, config = build(buildah, target, folder)
    built = round(time.monotonic() - began)
    found = {"steps built in": f"{built} s", **run_locked_down(root, config, folder)}
    run = {
        "date": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", *command]),
        "stands for": base.image,
        "base": f"Debian {base.release}, by debootstrap",
        "target": target,
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "image.json").write_text(json.dumps({**run, "seen": found, "not covered": NOT_COVERED}, indent=1) + "\n")
    (output / "image.md").write_text(report(found, run), encoding="utf-8")
    print(report(found, run))


def main(argv: Sequence[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build the Dockerfile and run its image, without a Docker daemon.")
    parser.add_argument("--target", default="cpu", help="stage of the Dockerfile (default: cpu)")
    parser.add_argument("--base", type=Path, help="root file system made by debootstrap; default: a new one")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the report (default: docs/results/image)"
    )
    options = parser.parse_args(argv)
    command = ["deploy/image/verify.py", *argv]
    folder = Path(tempfile.mkdtemp(prefix="rtap-image-"))
    buildah = Buildah(folder / "buildah")
    try:
        verify(options.target, folder, options.base or folder / "base", options.output, command)
    except (VerifyError, subprocess.CalledProcessError) as error:
        print(f"verification failed: {error}", file=sys.stderr)
        return 1
    finally:
        if (buildah.folder / "storage.conf").exists():
            buildah("rm", "--all")
            buildah("rmi", "--all", "--force")
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
