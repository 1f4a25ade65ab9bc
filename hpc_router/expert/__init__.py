"""The job of an expert: an agent on the GPU node, which owns one engine."""
