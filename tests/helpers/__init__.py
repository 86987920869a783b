"""What several test files share. Nothing here is a test, and no test file imports another."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
