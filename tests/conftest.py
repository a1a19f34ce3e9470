"""Settings for all tests: one thread, so that small networks are fast and do not fight for cores; a quiet Lightning."""

import logging
import os
import signal

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c():
    """Ctrl-C works in the tests and what they start, also where a shell began them in the background without it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
