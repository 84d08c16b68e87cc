"""Maths and engine; imports nothing else of ours, and nothing by itself."""
