"""Where the wings meet: options, what runs here, and a folder brought into memory.

Imports nothing, so that options can be had without torch; `mistral.load` is the door.
"""
