"""Shared state: files in the run directory, through which the processes of a deployment communicate.

Every file has one writer, which replaces it atomically. Readers accept that a file is missing, outdated or incomplete.
"""
