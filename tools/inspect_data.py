"""megatron_scmoe/commands/inspect_data.py, from a plain checkout and from any folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_scmoe.commands.inspect_data import main

if __name__ == "__main__":
    sys.exit(main())
