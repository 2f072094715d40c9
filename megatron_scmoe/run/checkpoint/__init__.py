"""What this package adds to the host's distributed checkpoints.

model_options.py  which options make a model, and which are worth a note when they change
record.py    the readable file beside every checkpoint, and how two of them differ
unpickle.py  what is unpickled of one, and what may be in it
contents.py  which iterations are on disk, and whether they are whole
aside.py     an iteration that is saved again: the old one stays until the new one is whole
folders.py   before anything is read: are --load and --save the folders that the user means?
resume.py    before a run starts: is --load this model, and what the host has to be told
param_schedule.py  whose learning rate, weight decay and constants it follows
transfer.py  while it loads: tensors that the checkpoint does not have
writer.py    while it saves with --async-save: the processes that write
errors.py    while it saves or loads: a full disk or a broken file as one line
replacements.py  where the host has no hook for all this
"""
