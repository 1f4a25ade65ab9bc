"""Two C programs for benchmarks, a load generator and a mock engine, and the Python code that builds and runs them.

They are written in C because they share a machine with the program under test. Even with a thousand streams of forty
events per second, they must leave most of a core to that program. The module `build` compiles them on first use.
"""
