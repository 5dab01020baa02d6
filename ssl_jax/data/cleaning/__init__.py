"""Cleaning: named steps, each a pure function of a dialogue, which `data.cleaning` lists in order.

A step takes a dialogue and returns it, a changed copy, or None where nothing is left of it. Steps that are safe for
text a language model learns from are the default; none of them touches an emoji.
"""
