"""One folder per script of launch/: what it is about to do (plan), its parts, its course (job), its words (banner).

Read distill/ first; proxy/ builds on it, and it ends with measure/. execution.py is what all four share.
May import everything of engine/ but cli.py; finetune/ and proxy/ not each other.
"""
