"""Clients of a served classifier.

asynchronous  `AsyncClient`, which does the work
blocking      `Client`, the same without await
classifier    a served model as a classifier like any other
wire          HTTP and gRPC behind one interface, and what is sent again
"""
