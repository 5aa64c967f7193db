"""The code of an exported model, checked and tested here as part of this project.

`trainer/exporting/single_file.py` makes self-contained files of these modules.
"""
