"""``python -m zrl``: the same as the command ``zrl``."""

from zrl.cli.main import main

if __name__ == "__main__":
    main(prog_name="zrl")
