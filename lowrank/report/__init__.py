"""What a finished, interrupted or failed run shows: ``report.html``, the terminal's closing table, SVG curves.

Everything here reads the run directory, or plain values, and trains nothing.
"""
