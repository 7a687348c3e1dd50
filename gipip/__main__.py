"""`python -m gipip` is the `gipip` command, also where gipip is only on the PYTHONPATH."""

from gipip.cli import app

app(prog_name="gipip")
