"""Is this machine, and this layout on it, fit for a run?

`findings.py` says what a finding is; `machine.py` and `gpu.py` look at one machine and need no
process group, the former also at the start of every training; `links.py` measures the expert
parallel groups. `tools/doctor.py` runs and prints all of it.
"""
