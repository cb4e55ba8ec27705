"""Chromium or Chrome, for the tests that look at a page; without it they are skipped."""

import shutil
import subprocess

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))),
    None,
)
browser = pytest.mark.skipif(
    not BROWSER, reason='no Chromium or Chrome is installed here (Debian: apt-get install chromium)'
)


def browse(url, profile, *options, timeout=120):
    "What it prints; `profile` is an empty folder for what it keeps."
    start = (BROWSER, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={profile}')
    done = subprocess.run([*start, *options, url], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout
