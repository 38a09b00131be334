"""launch/finetune.py: an encoder on labelled tasks, with a grid and seeds.

Read plan.py first, then job.py and unit.py.
Imports nothing of its neighbours in engine/jobs/ but execution.py.
"""
