"""Progress bars of transformers are off, so that tests read only their own lines."""

from transformers.utils import logging

logging.disable_progress_bar()
