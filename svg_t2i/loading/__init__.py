"""A pipeline's parts from folders and the Hub, and its own folder.

`sources` finds and loads the parts of every layout, `components` makes them models of diffusers, `saved` knows what is
in the folder of a saved pipeline.
"""
