"""The code that goes with an exported model: written, checked and tested here as part of this project.

`trainer/exporting/single_file.py` makes of each file one that needs nothing of this project.
"""
