"""Write server/rtap_server/vllm_flags.json: names of vLLM's flags, which `rtap serve` checks without importing vLLM."""

import json
from pathlib import Path

from rtap_server.engine.vllm_compat import vllm_flags

FILE = Path(__file__).parents[1] / "server" / "rtap_server" / "vllm_flags.json"

if __name__ == "__main__":
    FILE.write_text(json.dumps(vllm_flags(), indent=1, ensure_ascii=False) + "\n", "utf-8")
