"""A tritonserver that is found, started, checked and kept up.

servers    find a tritonserver and what it can do
placement  which configuration, how many instances, threads of each
endpoint   where Triton itself listens, known to nobody but the guard
command    the hardened command line for the version found
plan       all that is decided and checked before a start
process    one server process that leaves nothing behind
usage      its processes, memory and open files
leftovers  what killed launchers left behind, removed
log        its output: drained, its tail kept, its cause of failure found
selftest   the golden answers through the wire
startup    from a plan to a server that is ready, or an error with its log
launcher   all of that in order, and again when it breaks: `running_server`
"""
