"""Measurements of the whole: the demo, memory, the anytime curve. Imports the other packages, never the other way."""
