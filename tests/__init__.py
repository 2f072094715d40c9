"""Tests of the CPU backend, the same on every machine.

Where the package sees a GPU, fewer symbols of the host are replaced (megatron_scmoe/host/table.py),
and tests would mix inputs on the CPU with modules on the GPU. This is imported before torch by
whatever is in `tests`, programs and forked ranks included, and all that they start inherits it.
Tests of the GPU run with SCMOE_GPU_TESTS=1.
"""

import os

if os.environ.get("SCMOE_GPU_TESTS") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
