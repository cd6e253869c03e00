"""Import the heavy packages once in the fork server, so that ranks start fast; importing this does nothing else."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401
import transformers  # noqa: F401

import ebft_mega.lifecycle.run  # noqa: F401
