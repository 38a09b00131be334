"""launch/proxy.py: several mappings distilled briefly, side by side against one teacher pass, and scored.

Read plan.py first, then job.py and cohort.py. facts.py is what a search reads of it, without torch.
teacher_cache.py keeps its files in cache_files.py.
Imports nothing of finetune/.
"""
