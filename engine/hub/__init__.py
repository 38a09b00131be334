"""Hugging Face folders and hub models: files, tokenizers and configurations, checked before a library reads them.

Read files.py first.
May import errors.
"""
