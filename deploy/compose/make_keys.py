"""Create the secrets of compose.keys.yaml: a keys file for one client and Prometheus, and Prometheus's own key.

The client's key is printed once and not stored: the keys file contains digests. Existing secrets are not overwritten.
"""

import hashlib
import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("secrets")


def keys_toml(client: str, metrics: str) -> str:
    """Return the text of the keys file, with the digest of each key."""

    def table(name: str, key: str, *lines: str) -> str:
        return "\n".join(
            ["[[keys]]", f'name = "{name}"', f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"', *lines]
        )

    return table("client", client) + "\n\n" + table("prometheus", metrics, 'scope = "metrics"') + "\n"


def main(folder: Path = FOLDER) -> int:
    """Create the files. Exit code 1 if the folder exists."""
    if folder.exists():
        print(f"{folder} already exists; remove it to create new keys", file=sys.stderr)
        return 1
    client, metrics = (f"rtap-{secrets.token_urlsafe(32)}" for _ in range(2))
    # Each container reads the mounted files under its own user id, so they are world-readable in a private folder.
    folder.mkdir(mode=0o700)
    for name, text in (("keys.toml", keys_toml(client, metrics)), ("metrics.key", metrics)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o644)
    print(f"API key for clients (shown only once): {client}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
