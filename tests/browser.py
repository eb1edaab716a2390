"""A page as a browser sees it: headless Chromium, where there is one."""

import pathlib
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (.ci/run installs it)")


def dump(page: pathlib.Path, profile: pathlib.Path, *, query: str = "") -> tuple[str, str]:
    """(the document after loading, what its console said); `query` follows the page's address."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    flags += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", "--dump-dom"]
    command = [CHROMIUM, *flags, page.as_uri() + query]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
