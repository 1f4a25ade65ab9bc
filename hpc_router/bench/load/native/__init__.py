"""The benchmarks' two C programs, a load generator and a mock engine, and the Python code that builds and runs them.

They are written in C because they share the machine with the program under test: at a thousand streams with forty
events per second they must leave it most of a core. `build` compiles them on first use.
"""
