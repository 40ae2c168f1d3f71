"""Checkpoints on the disks of the nodes themselves: more frequent than those of the shared folder, mirrored to other
nodes, and read from wherever a sound copy of each piece is left.

* ``parts``: what lies on one node: a folder for each rank's part, and in it one for each save. No torch.
* ``peers``: how the processes that write for the ranks speak to each other. No torch.
* ``worker``: what these processes do: write, mirror, commit, give up. No torch.
* ``inventory``: what all nodes hold together, and which of it continues a run. No torch.
* ``checking``: whether parts are what was saved, alone and together. No torch.
* ``copies``: opening one: a sound copy of each part, checked by a rank that has it.
* ``offline``: reading them without a job, from the folders of nodes.
* ``saves``: a save from the side of the ranks.
"""
