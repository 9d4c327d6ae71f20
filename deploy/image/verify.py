"""Build the image's own Dockerfile without a Docker daemon and run what it made as Docker would run it, locked down.

buildah (Debian's package) reads the Dockerfile, so the proof cannot drift from it. Its base comes from no registry but
is made here by debootstrap: Debian of the same release with Debian's Python. The server then runs in a mount, process
and network namespace of its own with the image's own entry point, environment, user and health check: read-only root,
no capabilities, only /cache, /tmp and /dev/shm writable. Needs root, buildah, debootstrap and about 20 GB. It proves
nothing about Docker's own engine, and nothing about the published base image.
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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "image"
UNPROVEN = (
    "Docker's own engine and BuildKit: the steps are run by buildah, the server by unshare, chroot and setpriv.",
    "The published base image: the base here is made by debootstrap and has Debian's Python.",
    "The `cuda` target.",
)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INSIDE = Path(__file__).with_name("prove_image_inside.py")


class ProofError(Exception):
    """What is missing, or what did not hold, in one sentence."""


@dataclass(frozen=True, slots=True)
class Base:
    """What the Dockerfile builds on: the image's name, and the Debian release that it says."""

    image: str
    release: str


def base_of(dockerfile: str) -> Base:
    """The only base that comes from elsewhere."""
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE)) | {"scratch"}
    outside = set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) - stages
    if len(outside) != 1:
        raise ProofError(f"the Dockerfile should have one base from outside, not {sorted(outside)}")
    image = outside.pop()
    return Base(image, image.split("@")[0].rsplit("-", 1)[-1])


@dataclass(frozen=True, slots=True)
class Buildah:
    """buildah with its storage in a folder of its own."""

    folder: Path

    def prepare(self) -> None:
        """Storage, no registry at all, and no signatures: every image comes from here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{self.folder}/root"\nrunroot = "{self.folder}/run"\n'
        (self.folder / "storage.conf").write_text(storage, encoding="utf-8")
        (self.folder / "registries.conf").write_text("unqualified-search-registries = []\n", encoding="utf-8")
        (self.folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}', encoding="utf-8")

    def __call__(self, command: str, *arguments: str | Path) -> str:
        """Its output; what it says meanwhile goes to stderr."""
        named = {"storage.conf": "CONTAINERS_STORAGE_CONF", "registries.conf": "CONTAINERS_REGISTRIES_CONF"}
        environment = {**os.environ, **{variable: str(self.folder / file) for file, variable in named.items()}}
        signed = ["--signature-policy", self.folder / "policy.json"] if command in ("build", "commit", "from") else []
        line = ["buildah", command, *signed, *arguments]
        return subprocess.run(line, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout.strip()


def make_base(buildah: Buildah, base: Base, folder: Path) -> None:
    """Debian of the base's release, with its Python where the base has it, under the base's name."""
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
    """This machine's configuration of pip, whatever files and variables it is spread over, for the steps of the build:
    mounted, and so in no layer. Local folders that it names are mounted as well."""
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
    # An index is a folder of links into others beside it
    local = {path.parent if path.name == "simple" else path for path in named if path.is_absolute() and path.exists()}
    mounts = {config: Path("/etc/pip.conf")} | {path: path for path in local}
    return [part for source, target in mounts.items() for part in ("--volume", f"{source}:{target}:ro")]


def build(buildah: Buildah, target: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """(mounted root file system, the image's configuration) of the Dockerfile's ``target``."""
    buildah(
        "build", "--isolation", "chroot", "--pull-never", "--format", "docker", "--target", target,
        "--tag", "rtap:proof", *pip_volumes(folder), ROOT,
    )  # fmt: skip
    container = buildah("from", "--pull-never", "localhost/rtap:proof")
    inspected: dict[str, Any] = json.loads(buildah("inspect", container))
    return Path(buildah("mount", container)), inspected["Docker"]["config"]


def run_locked_down(root: Path, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What was seen while the image's server ran in namespaces of its own."""
    seen = folder / "seen.json"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    namespaces = ["unshare", "--mount", "--net", "--pid", "--ipc", "--fork", "--kill-child"]
    subprocess.run([*namespaces, sys.executable, INSIDE, root, folder / "config.json", seen], check=True)
    found: dict[str, Any] = json.loads(seen.read_text(encoding="utf-8"))
    return found


def report(found: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Markdown of one proof."""
    lines = ["# The image, proven without a Docker daemon", "", *(f"- {k}: `{v}`" for k, v in run.items()), ""]
    lines += ["| seen | |", "|---|---|", *(f"| {k} | {v} |" for k, v in found.items()), ""]
    return "\n".join([*lines, "Not proven:", "", *(f"- {sentence}" for sentence in UNPROVEN), ""])


def prove(target: str, folder: Path, base_folder: Path, output: Path, command: Sequence[str]) -> None:
    """The whole proof. Raises ProofError or CalledProcessError where it does not hold."""
    missing = [tool for tool in ("buildah", "debootstrap", "unshare", "setpriv") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        raise ProofError(f"this needs root and {', '.join(missing) or 'nothing more'}: apt-get install {missing}")
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
        "in the place of": base.image,
        "base": f"Debian {base.release}, by debootstrap",
        "target": target,
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "image.json").write_text(json.dumps({**run, "seen": found, "unproven": UNPROVEN}, indent=1) + "\n")
    (output / "image.md").write_text(report(found, run), encoding="utf-8")
    print(report(found, run))


def main(argv: Sequence[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build the Dockerfile and run its image, without a Docker daemon.")
    parser.add_argument("--target", default="cpu", help="stage of the Dockerfile (default: cpu)")
    parser.add_argument("--base", type=Path, help="a root file system that debootstrap made before; default: a new one")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the report goes (default: docs/results)")
    options = parser.parse_args(argv)
    command = ["scripts/prove_image.py", *argv]
    folder = Path(tempfile.mkdtemp(prefix="rtap-image-"))
    buildah = Buildah(folder / "buildah")
    try:
        prove(options.target, folder, options.base or folder / "base", options.output, command)
    except (ProofError, subprocess.CalledProcessError) as error:
        print(f"not proven: {error}", file=sys.stderr)
        return 1
    finally:
        if (buildah.folder / "storage.conf").exists():
            buildah("rm", "--all")
            buildah("rmi", "--all", "--force")
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
