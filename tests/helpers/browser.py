"""A headless Chromium, to look at a page as a person would: what it shows, how wide it is, what its console says."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
DARK = "--blink-settings=preferredColorScheme=0"


def browser() -> str:
    """Gives the browser's command, or skips the test; CI sets TORCHQ_BROWSER, and then its absence is a failure."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None and os.environ.get("TORCHQ_BROWSER"):
        pytest.fail(f"TORCHQ_BROWSER asks for one of {', '.join(NAMES)}")
    if found is None:
        pytest.skip("no browser: apt-get install chromium-headless-shell")
    return found


def look(page: Path, width: int, script: str, *, dark: bool = False) -> tuple[Any, list[str]]:
    """Opens the page in a window of this width, and runs a script whose value is given back as JSON.

    Returns the value, and the lines of the console. No host can be reached, so what asks for the network shows there.
    """
    inside = f"<script>addEventListener('load', () => {{ const found = (() => {{ {script} }})(); "
    inside += "const pre = document.createElement('pre'); pre.id = 'found'; pre.textContent = JSON.stringify(found); "
    inside += "document.body.append(pre); });</script>"
    copy = page.with_name(f"looked-at-{page.name}")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", inside + "</body>"), encoding="utf-8")
    run = subprocess.run(
        [
            browser(),
            *FLAGS,
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--window-size={width},800",
            *([DARK] if dark else []),
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', run.stdout, re.DOTALL)
    return json.loads(html.unescape(found)), [line for line in run.stderr.splitlines() if "CONSOLE" in line]
