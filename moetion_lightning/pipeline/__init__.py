"""Stages: an unchanged module cut at its layers and run as a pipeline, and the logs that replay single stages."""
