"""Speed, measured honestly: how long an answer takes, how many there are per second, and that they are right.

inputs       what is measured and how long, and the image files that are sent
systems      a bundle, an ONNX file, a repository or a server as what is measured
records      what is found, in words and as JSON
generator    a process that sends requests to a server when they are due, and notes what came back when
measuring    one run: an open or a closed loop, or whole batches
samples      percentiles a sample can carry, histograms, bootstrap intervals
scenarios    single-stream, server, offline, sweep; the highest rate under a latency bound; more classes
triton       Triton's own account: queue, compute, batches; perf_analyzer beside our own figures
run          all of that in order, accuracy first
results      what it was measured on, what is read back, and two results as ratios with intervals

What runs in a generator's process imports neither torch nor onnxruntime.
"""
