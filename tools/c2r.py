"""megatron_scmoe/commands/c2r.py, from a plain checkout and from any folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_scmoe.commands.c2r import main

if __name__ == "__main__":
    sys.exit(main())
