"""The two C programs of the benchmarks, a load generator and a mock engine, and what runs them and reads their output.

In C because they share the machine with what is measured: a thousand streams at forty events a second must leave them
most of a core. They are compiled where they are first used (`build`).
"""
