"""Speed, measured honestly: how long an answer takes, how many there are per second, and that they are right.

config       what is measured, and how long
pictures     the image files that are sent
targets      a bundle, an ONNX file, a repository or a URL as something that answers
arrivals     when requests are due: a Poisson process
generator    a process that sends them and notes what came back when
sender       its main module
links        how it reaches what it measures: Triton's protocols, or a pipe
engine       a bundle or a graph answering at the other end of the pipe, in batches
samples      percentiles a sample can carry, histograms, bootstrap intervals
search       the highest rate that stays under a latency bound
scenarios    single-stream, server, offline, sweep
heads        the same graph with a plain head, or with more classes
statistics   Triton's own account: queue, compute, batches
quality      clean accuracy and attack success of what is measured
machine      what it was measured on
peer         perf_analyzer beside our own figures
run          all of that in order
results      the folder it is written to
compare      two such folders: ratios with intervals

What runs in a generator's process imports neither torch nor onnxruntime.
"""
