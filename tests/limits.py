"""How long tests wait before they give up, in seconds: several times of what it takes, because a
machine does other things too. What a test is about, such as a run's own time-out, stands there."""

COLLECTIVE_S = 120  # of ranks that wait for each other
PROCESS_S = 60  # of a process that does one thing
JOB_S = 240  # of ranks or programs, from their start to their end
PROOF_S = 400  # of a part of tools/gpu_proof, rehearsed
CLUSTER_S = 1200  # of a job on nodes that are all on this machine, lost in between and back again
