"""Tensors only: operators, schedules, capture and reconstruction. No files, no process groups, no Lightning."""
