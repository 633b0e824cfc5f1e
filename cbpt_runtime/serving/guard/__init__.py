"""The public ports, in front of Triton: what is admitted is passed on.

http_guard      HTTP, and both guards' start and stop; `grpc_guard` the same over gRPC
admission       who may ask over HTTP, and what a question may look like; `grpc_admission` the same for gRPC
room            how much of it is held at once
"""
