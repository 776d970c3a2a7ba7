"""The report as one self-contained HTML page. Imports no torch."""
