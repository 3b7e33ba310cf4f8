"""Imported once by the server from which the processes of tests are forked: what nearly all of them import."""

from __future__ import annotations

import gc

import helpers  # noqa: F401
import peft  # noqa: F401
import trainer_helpers  # noqa: F401
from transformers.models.gpt2 import modeling_gpt2  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import hf_ouroboros.trainer  # noqa: F401

gc.collect()
gc.freeze()  # accelerate collects after every `train()`, and a forked process that looks at objects copies their memory
