"""``python -m blipstream``."""

from blipstream.cli import app

if __name__ == "__main__":
    app(prog_name="blipstream")
