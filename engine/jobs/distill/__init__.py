"""launch/distill.py: one teacher, one student, one mapping.

Read plan.py first, then job.py, module.py and build.py.
"""
