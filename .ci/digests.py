"""Pin images: `digests.py FILE...` puts the digest that each `NAME:TAG@sha256:...` or `NAME:TAG` has now behind it.

Asks the registries, with `docker` or `skopeo`. Looked at are the defaults of the Dockerfile's *_BASE arguments and
of compose's *_IMAGE variables. Read the differences before committing them.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

IMAGE = re.compile(r"((?:_BASE=|_IMAGE:-))([\w./-]+:[\w.-]+)(?:@sha256:[0-9a-f]{64})?")


def digest(image: str) -> str:
    """The digest of the image's index, over all processors."""
    if shutil.which("docker"):
        command = ["docker", "buildx", "imagetools", "inspect", "--raw", image]
    else:
        command = ["skopeo", "inspect", "--raw", f"docker://{image}"]
    manifest = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return f"sha256:{hashlib.sha256(manifest).hexdigest()}"


def main() -> None:
    """Rewrite the files."""
    for path in map(Path, sys.argv[1:]):
        text = path.read_text(encoding="utf-8")
        path.write_text(
            IMAGE.sub(lambda found: f"{found[1]}{found[2]}@{digest(found[2])}", text), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
