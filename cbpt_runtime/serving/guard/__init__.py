"""The public ports, in front of Triton: what is admitted is passed on.

http_guard      HTTP, and both guards' start and stop; `grpc_guard` the same over gRPC
admission       who may ask over HTTP, what a question may look like, and how much is held at once
grpc_admission  what a question over gRPC may look like
"""
