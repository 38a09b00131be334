"""Teacher and student: loading, initialising, running without pads, capturing inner tensors.

Read teacher.py, student.py and capture.py first; install.py prepares a model for capture;
own_attention.py is what is known of models outside of transformers' attention interface.
May import errors, mapping, config, hub, ranks, kernels and data.
"""
