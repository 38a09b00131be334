"""Python that uses an exported model, for its card."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from engine.hub.sentence import MODULES
from engine.models.hub import AUTO_CLASSES, Head, init_arguments

SENTENCES = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")  # this folder, or the name under which it is published
vectors = model.encode(["A small model.", "It has learned from a large teacher."])
print(model.similarity(vectors, vectors))
"""
LOAD = """\
import torch
from transformers import {names}

folder = "."  # this folder, or the name under which it is published
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder{arguments})
"""
STATES = """\
texts = ["A small model.", "It has learned from a large teacher."]
batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
with torch.inference_mode():
    states = model(**batch).last_hidden_state  # sentences x tokens x {width}
print(states.shape)
"""
FILL_MASK = """\
batch = tokenizer(f"The capital of France is {tokenizer.mask_token}.", return_tensors="pt")
with torch.inference_mode():
    logits = model(**batch).logits  # sentences x tokens x words
print(tokenizer.decode(logits[batch["input_ids"] == tokenizer.mask_token_id].argmax(-1)))
"""
TEXTS = """\
batch = tokenizer({texts}, truncation=True, return_tensors="pt")
with torch.inference_mode():
    logits = model(**batch).logits
"""
LABEL = "print(model.config.id2label[logits.argmax(-1).item()])\n"
NUMBER = "print(logits.item())\n"
ANSWER = """\
batch = tokenizer("Who wrote the letter?", "Ada wrote the letter.", truncation=True, return_tensors="pt")
with torch.inference_mode():
    output = model(**batch)
start, end = output.start_logits.argmax(), output.end_logits.argmax()
print(tokenizer.decode(batch["input_ids"][0, start : end + 1]))
"""


def snippet(folder: Path, config: PretrainedConfig, head: Head, *, pairs: bool) -> str:
    """Returns Python that loads the model of the export `folder` from the current folder, and uses it. pairs: whether a
    classifier reads two texts."""
    if (folder / MODULES).is_file():
        return SENTENCES
    auto = AUTO_CLASSES[head][0].__name__
    arguments = ", add_pooling_layer=False" if init_arguments(config, head) else ""
    loaded = LOAD.format(names=", ".join(sorted([auto, "AutoTokenizer"])), auto=auto, arguments=arguments)
    return loaded + _use(config, head, pairs=pairs)


def _use(config: PretrainedConfig, head: Head, *, pairs: bool) -> str:
    if head == "mlm":
        return FILL_MASK
    if head == "span":
        return ANSWER
    if head == "classification":
        texts = '"One text.", "And another one."' if pairs else '"One text."'
        return TEXTS.format(texts=texts) + (NUMBER if config.num_labels == 1 else LABEL)
    return STATES.format(width=config.hidden_size)
