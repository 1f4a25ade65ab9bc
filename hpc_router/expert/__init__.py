"""The expert job: an agent on the GPU node that owns one engine."""
