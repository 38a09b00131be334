"""launch/score.py: scores of encoders without fine-tuning, beside the first of them.

Read job.py; engine/tasks/texts.py has the features and engine/tasks/probe.py and retrieval.py what is made of them.
"""
