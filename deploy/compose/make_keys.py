"""Make the two secrets of compose.keys.yaml: a keys file for one client and Prometheus, and the key of the latter.

The client's key is printed once and kept nowhere: the file has digests only. Refuses to write over what is there.
"""

import hashlib
import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("secrets")


def keys_toml(client: str, metrics: str) -> str:
    """The keys file, with both keys as digests."""

    def table(name: str, key: str, *lines: str) -> str:
        return "\n".join(
            ["[[keys]]", f'name = "{name}"', f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"', *lines]
        )

    return table("client", client) + "\n\n" + table("prometheus", metrics, 'scope = "metrics"') + "\n"


def main(folder: Path = FOLDER) -> int:
    """Exit code: 1 where there are keys already."""
    if folder.exists():
        print(f"{folder} is there already: remove it to make new keys", file=sys.stderr)
        return 1
    client, metrics = (f"rtap-{secrets.token_urlsafe(32)}" for _ in range(2))
    # Containers read these as users of their own, and compose mounts files as they are: the folder keeps others out
    folder.mkdir(mode=0o700)
    for name, text in (("keys.toml", keys_toml(client, metrics)), ("metrics.key", metrics)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o644)
    print(f"key for clients, shown this once: {client}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
