"""Shared state: the files of the run directory, through which the processes of a deployment communicate.

Every file has one writer, which replaces it atomically. Readers tolerate files that are missing, outdated or partly
copied.
"""
