"""No progress bars of transformers between the lines that tests read."""

from transformers.utils import logging

logging.disable_progress_bar()
