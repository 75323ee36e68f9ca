"""The process that `hub.py` starts: brings the files that its argument names, and says in one line why not."""

import json
import sys

from huggingface_hub import hf_hub_download


def main() -> None:
    """Download what the JSON argument asks for."""
    given = json.loads(sys.argv[1])
    try:
        for name in given["files"]:
            hf_hub_download(given["repository"], name, revision=given["revision"], local_dir=given["folder"])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
