"""Clients of a served classifier.

asynchronous  `AsyncClient`, which does the work
blocking      `Client`, the same without await
classifier    a served model as a classifier like any other
retries       what is sent again, and what is said in the end
wire          HTTP and gRPC behind one interface
"""
