"""Layer-mapped distillation on DeepSpeed: everything that runs under the deepspeed launcher.

Read mapping.py, config/distill.py, losses/base.py, train/trainer.py and jobs/distill/job.py first.
Never imports ga.
"""

__version__ = "0.1.0"
