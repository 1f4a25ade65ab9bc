"""The data path, shared by router and agent: pass one request upstream and its response downstream."""
