"""From a bundle to what a server loads: an ONNX graph behind a parity gate, a Triton repository around it.

graph         the served classifier as one torch module: pixels in, both heads and the alarm out
onnx          that module as the bytes of one portable, deterministic ONNX file
weights       in a file of their own, beside a graph that is too large for one
session       onnxruntime sessions whose provider is checked
images        the pictures the gate looks at, and on them what a lower precision costs
parity        the gate: PyTorch against onnxruntime
precision     fp16 and int8 variants of a graph, gated and timed; which layers become int8, and how
profiles      what differs between deployment targets
triton        config.pbtxt, written through Triton's own protobuf
cpus          how many this process may use, and which instructions they have
golden        a few images and the expected answers, which travel with the repository
repository    the Triton model repository, whole or absent, with a SHA-256 manifest
manifest      what it says of itself
written       what is the same in every export; `foreign_graph` says what is not, of a graph
classifier    a graph or a repository as a classifier
verify        all of it checked again, later and elsewhere
"""
