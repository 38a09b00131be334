"""The step: loop, DeepSpeed's engine, reports, checkpoints, export. It knows neither losses nor tasks.

Read trainer.py and trainee.py first, then deepspeed_engine.py, checkpoint.py and monitor.py.
May import errors, mapping, config, records, ranks, kernels, data and models.
"""
